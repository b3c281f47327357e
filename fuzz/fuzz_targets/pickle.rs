//! Arbitrary pickles: no shape's reader panics or takes more than linear time.
#![no_main]

use control::rpc::pickle;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = pickle::read_enum(data);
    let _ = pickle::read_decimal(data);
    let _ = pickle::read_binary_size(data);
    let _ = pickle::read_file(data);
    if let Ok(slots) = pickle::read_resource_slot(data) {
        let again = pickle::read_resource_slot(&pickle::write_resource_slot(&slots));
        assert_eq!(again, Ok(slots));
    }
    if let Ok(image) = pickle::read_image_ref(data) {
        assert_eq!(
            pickle::read_image_ref(&pickle::write_image_ref(&image)),
            Ok(image)
        );
    }
});
