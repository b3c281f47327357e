//! Arbitrary bytes where a region should be: no reader and no starting writer may panic, hang, or
//! answer more rows than the region has.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shared::fuzzing::DamagedRegions;

thread_local! {
    static REGIONS: DamagedRegions = DamagedRegions::create().expect("a tmpfs at /dev/shm");
}

fuzz_target!(|data: &[u8]| {
    REGIONS.with(|regions| regions.read(data));
});
