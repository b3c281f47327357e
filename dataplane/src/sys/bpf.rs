//! What the BPF system call offers and `aya` does not: running a program once, changing the program
//! of any pinned link, removing an entry of a map whose records are not known, and reading or removing
//! many entries of a map at once.
//!
//! In: a loaded program. Out: what it returned; the link runs it; counters. Also the file system for
//! pins.

use std::ffi::CString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use aya::Pod;
use aya::maps::{MapData, MapError, MapType};
use rustix::fs::{StatFs, statfs};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::net::{self, AddressFamily, SocketType};

/// linux/bpf.h.
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_MAP_DELETE_BATCH: libc::c_long = 27;
const BPF_LINK_UPDATE: libc::c_long = 29;
/// linux/magic.h.
const BPF_FS_MAGIC: u32 = 0xcafe_4a11;

/// The `test` member of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    padding: u32,
}

const _: () = assert!(size_of::<TestRun>() == 80);

/// Runs a classifier once, on an empty Ethernet frame. Answers what it returned.
///
/// # Errors
/// The kernel's refusal.
pub fn run_once(program: impl AsFd) -> io::Result<u32> {
    let frame = [0_u8; 64];
    let mut attributes = TestRun {
        prog_fd: u32::try_from(program.as_fd().as_raw_fd()).map_err(io::Error::other)?,
        data_size_in: 64,
        data_in: frame.as_ptr().expose_provenance() as u64,
        repeat: 1,
        ..TestRun::default()
    };
    // SAFETY: the `test` member; the kernel reads `frame`, which lives through the call, for as long as
    // stated, and has nowhere to write to.
    unsafe { call(BPF_PROG_TEST_RUN, &mut attributes) }?;
    Ok(attributes.retval)
}

/// The `path` and `file_flags` members of `union bpf_attr`, and the one with `link_update`.
#[repr(C)]
#[derive(Default)]
struct OpenPin {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct UpdateLink {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// The system call, with a member of `union bpf_attr`.
///
/// # Safety
/// `T` is the `repr(C)` form of the member that `command` reads, without padding. What addresses in it
/// point to lives through the call, is as long as the kernel takes it to be, and nothing else refers to
/// what the kernel writes.
///
/// # Errors
/// The kernel's refusal.
pub(super) unsafe fn call<T>(
    command: libc::c_long,
    attributes: &mut T,
) -> io::Result<libc::c_long> {
    // SAFETY: by the contract; `attributes` is borrowed through the call, and as long as stated.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer)
}

/// The same, by a command that answers with a descriptor.
///
/// # Safety
/// As for [`call`]; and `command` is one of those.
///
/// # Errors
/// The kernel's refusal.
pub(super) unsafe fn open<T>(command: libc::c_long, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: by the contract.
    let answer = unsafe { call(command, attributes) }?;
    let fd = i32::try_from(answer).map_err(io::Error::other)?;
    // SAFETY: by the contract the kernel has just made this descriptor for us, and for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Puts a program in the place of the one that a pinned link holds, in one step.
///
/// # Errors
/// The pin is no link, or it takes no other program.
pub fn replace_program(pin: &Path, program: BorrowedFd<'_>) -> io::Result<()> {
    let path = CString::new(pin.as_os_str().as_encoded_bytes())?;
    let mut pin = OpenPin {
        pathname: path.as_ptr().expose_provenance() as u64,
        ..OpenPin::default()
    };
    // SAFETY: the kernel reads `path`, which lives through the call, up to its final zero.
    let link = unsafe { open(BPF_OBJ_GET, &mut pin) }?;
    let number = |fd: i32| u32::try_from(fd).map_err(io::Error::other);
    let mut update = UpdateLink {
        link_fd: number(link.as_raw_fd())?,
        new_prog_fd: number(program.as_raw_fd())?,
        ..UpdateLink::default()
    };
    // SAFETY: the `link_update` member, which has no addresses.
    unsafe { call(BPF_LINK_UPDATE, &mut update) }?;
    Ok(())
}

/// The `map_fd` to `flags` members of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct Element {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

const _: () = assert!(size_of::<Element>() == 32);

/// Removes an entry of a pinned map, whatever its values are. No such entry or map is fine.
///
/// # Errors
/// It is no map, its keys are of another size, or the kernel refuses.
pub fn remove_entry(pin: &Path, key: &[u8]) -> Result<(), MapError> {
    if !pin.exists() {
        return Ok(());
    }
    let map = MapData::from_pin(pin)?;
    let size = usize::try_from(map.info()?.key_size()).unwrap_or(usize::MAX);
    if size != key.len() {
        return Err(MapError::InvalidKeySize {
            size: key.len(),
            expected: size,
        });
    }
    let map_fd = u32::try_from(map.fd().as_fd().as_raw_fd());
    let mut attributes = Element {
        map_fd: map_fd.map_err(|err| MapError::IoError(io::Error::other(err)))?,
        key: key.as_ptr().expose_provenance() as u64,
        ..Element::default()
    };
    // SAFETY: the kernel reads `key`, which lives through the call and is as long as the map's keys.
    match unsafe { call(BPF_MAP_DELETE_ELEM, &mut attributes) } {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(MapError::IoError(err)),
        _ => Ok(()),
    }
}

/// The `batch` member of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Removes entries of a hash table by one call for all, which `aya` has a call for each for. Those
/// that are not there are passed over.
///
/// # Errors
/// The kernel's refusal; entries may be left then.
pub fn remove_entries<K: Pod>(map: &MapData, keys: &[K]) -> io::Result<()> {
    let size = usize::try_from(map.info().map_err(io::Error::other)?.key_size());
    if size.ok() != Some(size_of::<K>()) {
        return Err(io::Error::other("keys of another size"));
    }
    let map_fd = u32::try_from(map.fd().as_fd().as_raw_fd()).map_err(io::Error::other)?;
    let mut left = keys;
    while !left.is_empty() {
        let mut batch = Batch {
            keys: left.as_ptr().expose_provenance() as u64,
            count: u32::try_from(left.len()).map_err(io::Error::other)?,
            map_fd,
            ..Batch::default()
        };
        // SAFETY: the kernel reads `count` keys of `left`, which lives through the call; they are of the
        // map's size by the check above. It writes to `batch` alone.
        match unsafe { call(BPF_MAP_DELETE_BATCH, &mut batch) } {
            Ok(_) => return Ok(()),
            // It stops before one that is not there.
            Err(err) if Errno::from_io_error(&err) == Some(Errno::NOENT) => {
                let removed = usize::try_from(batch.count).map_err(io::Error::other)?;
                left = left.get(removed + 1..).unwrap_or_default();
            }
            Err(err) => return Err(err),
        }
    }
    Ok(())
}

/// A hash table or an array that is read as a whole, many entries per call.
#[derive(Debug)]
pub struct Table<K, V> {
    map: OwnedFd,
    /// Values per entry: one, or one of each CPU.
    values_each: usize,
    keys: Vec<K>,
    values: Vec<V>,
}

impl<K: Pod + Default, V: Pod + Default> Table<K, V> {
    /// Entries that are asked for at once, in the beginning. The kernel answers with whole buckets of
    /// its table; one that is larger is asked for again with more room.
    const ROOM: usize = 256;

    /// # Errors
    /// It holds no such entries.
    pub fn of(map: &MapData) -> io::Result<Self> {
        let info = map.info().map_err(io::Error::other)?;
        let (values_each, apart) = match info.map_type() {
            Ok(MapType::Hash | MapType::Array) => (1, false),
            Ok(MapType::PerCpuHash) => (aya::util::nr_cpus().map_err(|(_, err)| err)?, true),
            _ => return Err(io::Error::other("neither a hash table nor an array")),
        };
        let sizes = [size_of::<K>(), size_of::<V>()].map(u32::try_from);
        if sizes != [Ok(info.key_size()), Ok(info.value_size())]
            // The kernel gives each CPU's value a multiple of eight bytes, a single CPU's too.
            || (apart && !size_of::<V>().is_multiple_of(8))
        {
            return Err(io::Error::other("a table of other entries"));
        }
        Ok(Self {
            map: map.fd().as_fd().try_clone_to_owned()?,
            values_each,
            keys: Vec::new(),
            values: Vec::new(),
        })
    }

    /// Tells `each` entry, with its value, or the values of each CPU.
    ///
    /// # Errors
    /// The kernel's refusal; what was told until then is not all.
    pub fn read(&mut self, mut each: impl FnMut(&K, &[V])) -> io::Result<()> {
        let mut place = 0_u64;
        let mut begun = false;
        let mut room = self.keys.len().max(Self::ROOM);
        loop {
            self.keys.resize(room, K::default());
            self.values.resize(room * self.values_each, V::default());
            let mut next = 0_u64;
            let mut batch = Batch {
                in_batch: if begun {
                    (&raw const place).expose_provenance() as u64
                } else {
                    0
                },
                out_batch: (&raw mut next).expose_provenance() as u64,
                keys: self.keys.as_mut_ptr().expose_provenance() as u64,
                values: self.values.as_mut_ptr().expose_provenance() as u64,
                count: u32::try_from(room).map_err(io::Error::other)?,
                map_fd: u32::try_from(self.map.as_raw_fd()).map_err(io::Error::other)?,
                ..Batch::default()
            };
            // SAFETY: the kernel reads `place` and writes to `next`, `keys` and `values`, which live
            // through the call and have room: four bytes of a place, and `count` entries of the map's
            // sizes by the check at the beginning. Of entries (`Pod`) all bits mean something.
            let last = match unsafe { call(BPF_MAP_LOOKUP_BATCH, &mut batch) } {
                Ok(_) => false,
                Err(err) => match Errno::from_io_error(&err) {
                    Some(Errno::NOENT) => true,
                    Some(Errno::NOSPC) => {
                        room *= 2;
                        continue;
                    }
                    _ => return Err(err),
                },
            };
            let found = usize::try_from(batch.count).map_err(io::Error::other)?;
            let entries = self.values.chunks_exact(self.values_each);
            for (key, values) in self.keys.iter().zip(entries).take(found) {
                each(key, values);
            }
            if last {
                return Ok(());
            }
            (place, begun) = (next, true);
        }
    }
}

/// A pinned hash table of two counters per number and CPU.
#[derive(Debug)]
pub struct CounterTable(Table<u32, [u64; 2]>);

impl CounterTable {
    /// # Errors
    /// There is no such pin, or it is of something else.
    pub fn open(pin: &Path) -> io::Result<Self> {
        let map = MapData::from_pin(pin).map_err(io::Error::other)?;
        Table::of(&map).map(Self)
    }

    /// Tells `each` the sums over all CPUs.
    ///
    /// # Errors
    /// The kernel's refusal; what was told until then is not all.
    pub fn read(&mut self, mut each: impl FnMut(u32, [u64; 2])) -> io::Result<()> {
        let sum = |sum: [u64; 2], it: &[u64; 2]| [sum[0] + it[0], sum[1] + it[1]];
        self.0
            .read(|key, values| each(*key, values.iter().fold([0; 2], sum)))
    }
}

/// The cookie of the network namespace of this thread, as programs see it.
///
/// # Errors
/// No socket; kernels before 5.14 do not know the question.
pub fn namespace_cookie() -> Result<u64, Errno> {
    let socket = net::socket(AddressFamily::UNIX, SocketType::DGRAM, None)?;
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).map_err(|_| Errno::INVAL)?;
    // SAFETY: `cookie` and `length` live through the call; the kernel writes at most `length` bytes
    // to the first, and how many it wrote to the second.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if answer < 0 {
        let err = io::Error::last_os_error();
        return Err(Errno::from_io_error(&err).unwrap_or(Errno::INVAL));
    }
    Ok(cookie)
}

/// Whether a directory lies on a file system for pins.
pub fn holds_pins(directory: &Path) -> bool {
    let of = |stat: StatFs| u32::try_from(stat.f_type).ok();
    statfs(directory).ok().and_then(of) == Some(BPF_FS_MAGIC)
}

/// Mounts a file system for pins.
///
/// # Errors
/// The kernel's refusal.
pub fn mount_pins(directory: &Path) -> io::Result<()> {
    mount(
        "bpf",
        directory,
        "bpf",
        MountFlags::empty(),
        Some(c"mode=0700"),
    )
    .map_err(Into::into)
}
