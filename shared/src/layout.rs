//! The bytes of the two regions: header, tables, rows.
//!
//! Every row is declared once with [`declare`], which makes a `#[repr(C)]` struct, asserts the offset
//! of each field and the size of the whole at compile time, and derives the byte encoding, the
//! field list that `docs/shared-memory.md` is compared with, and the layout hash. All integers are
//! little-endian and of fixed width. Invariant: any byte pattern decodes to *some* raw row without
//! a panic; whether it makes sense is decided by the typed rows in [`crate::desired`] and
//! [`crate::observed`].

#[cfg(test)]
mod documentation_tests;
mod rows;

pub(crate) use rows::*;

/// The layout of this build. To be raised with a change of [`LAYOUT_HASH`] once a release has the
/// version before; until then the hash alone tells layouts apart, and readers compare both.
pub const LAYOUT_VERSION: u32 = 1;

/// First word of every region file ("bai-regn").
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"bai-regn");

/// Bytes in front of the first table.
pub(crate) const HEADER_BYTES: usize = 4096;

/// Rows start on a cache line.
pub(crate) const ROW_ALIGNMENT: usize = 64;

/// One field of a row, as the documentation lists it.
#[derive(Debug, Clone, Copy)]
pub struct FieldInfo {
    /// Bytes from the start of the row.
    pub offset: usize,
    /// Field name.
    pub name: &'static str,
    /// Rust type.
    pub kind: &'static str,
    /// Bytes.
    pub size: usize,
    /// What it holds, with its unit.
    pub meaning: &'static str,
}

/// One row type, as the documentation lists it.
#[derive(Debug, Clone, Copy)]
pub struct RowInfo {
    /// Row name.
    pub name: &'static str,
    /// Bytes of one payload.
    pub size: usize,
    /// Its fields in order.
    pub fields: &'static [FieldInfo],
}

/// A raw row: a fixed number of bytes that encode and decode field by field.
pub(crate) trait RawRow: Sized {
    const INFO: RowInfo;
    fn store(&self, bytes: &mut [u8]);
    fn load(bytes: &[u8]) -> Self;
}

/// A field type: fixed-width integers and arrays of them.
pub(crate) trait Field: Sized {
    /// `bytes` is exactly the field's size long.
    fn store(&self, bytes: &mut [u8]);
    fn load(bytes: &[u8]) -> Self;
}

macro_rules! integer_field {
    ($($int:ty),*) => {$(
        impl Field for $int {
            #[inline]
            fn store(&self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_le_bytes());
            }
            #[inline]
            fn load(bytes: &[u8]) -> Self {
                let mut raw = [0u8; size_of::<$int>()];
                raw.copy_from_slice(bytes);
                <$int>::from_le_bytes(raw)
            }
        }
    )*};
}
integer_field!(u8, u16, u32, u64, i32);

impl<T: Field + Copy + Default, const N: usize> Field for [T; N] {
    #[inline]
    fn store(&self, bytes: &mut [u8]) {
        for (value, chunk) in self.iter().zip(bytes.chunks_exact_mut(size_of::<T>())) {
            value.store(chunk);
        }
    }
    #[inline]
    fn load(bytes: &[u8]) -> Self {
        let mut values = [T::default(); N];
        for (value, chunk) in values.iter_mut().zip(bytes.chunks_exact(size_of::<T>())) {
            *value = T::load(chunk);
        }
        values
    }
}

/// Declares raw rows; see the module text.
macro_rules! declare_rows {
    ($(
        $(#[$doc:meta])*
        $name:ident, $size:literal {
            $( $offset:literal $field:ident : $kind:ty = $meaning:literal, )*
        }
    )*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) struct $name { $( pub(crate) $field: $kind, )* }

        const _: () = {
            assert!(size_of::<$name>() == $size);
            // No hidden padding: the fields alone fill the row.
            assert!(0 $( + size_of::<$kind>() )* == $size);
            $( assert!(std::mem::offset_of!($name, $field) == $offset); )*
            // Rows are copied word by word.
            assert!($size % 8 == 0 && align_of::<$name>() <= 8);
        };

        impl $crate::layout::RawRow for $name {
            const INFO: $crate::layout::RowInfo = $crate::layout::RowInfo {
                name: stringify!($name),
                size: $size,
                fields: &[ $( $crate::layout::FieldInfo {
                    offset: $offset,
                    name: stringify!($field),
                    kind: stringify!($kind),
                    size: size_of::<$kind>(),
                    meaning: $meaning,
                }, )* ],
            };
            fn store(&self, bytes: &mut [u8]) {
                $( $crate::layout::Field::store(
                    &self.$field, &mut bytes[$offset..$offset + size_of::<$kind>()]); )*
            }
            fn load(bytes: &[u8]) -> Self {
                Self { $( $field: <$kind as $crate::layout::Field>::load(
                    &bytes[$offset..$offset + size_of::<$kind>()]), )* }
            }
        }

        impl Default for $name {
            fn default() -> Self {
                <Self as $crate::layout::RawRow>::load(&[0u8; $size])
            }
        }
    )*};
}
use declare_rows as declare;

/// Every row type, in the order of the documentation.
pub const ROWS: &[RowInfo] = &[
    Header::INFO,
    RawPort::INFO,
    RawContainer::INFO,
    RawNode::INFO,
    RawApplied::INFO,
    RawPortStatus::INFO,
    RawSample::INFO,
    RawAccelerator::INFO,
    RawNodeSample::INFO,
    RawBank::INFO,
    RawProcess::INFO,
];

/// FNV-1a over names, types, offsets and sizes of every row, the order of every counter, and the
/// header's size.
pub const LAYOUT_HASH: u64 = {
    let mut hash = 0xcbf2_9ce4_8422_2325;
    hash = mix_number(hash, HEADER_BYTES as u64);
    hash = mix_number(hash, ROW_ALIGNMENT as u64);
    let mut row = 0;
    while row < ROWS.len() {
        hash = mix(hash, ROWS[row].name.as_bytes());
        hash = mix_number(hash, ROWS[row].size as u64);
        let mut field = 0;
        while field < ROWS[row].fields.len() {
            let info = ROWS[row].fields[field];
            hash = mix(hash, info.name.as_bytes());
            hash = mix(hash, info.kind.as_bytes());
            hash = mix_number(hash, info.offset as u64);
            hash = mix_number(hash, info.size as u64);
            field += 1;
        }
        row += 1;
    }
    let groups = crate::observed::GROUPS;
    let mut group = 0;
    while group < groups.len() {
        hash = mix(hash, groups[group].0.as_bytes());
        let mut counter = 0;
        while counter < groups[group].1.len() {
            hash = mix(hash, groups[group].1[counter].name.as_bytes());
            counter += 1;
        }
        group += 1;
    }
    hash
};

const fn mix(mut hash: u64, bytes: &[u8]) -> u64 {
    let mut index = 0;
    while index < bytes.len() {
        hash = (hash ^ bytes[index] as u64).wrapping_mul(0x0100_0000_01b3);
        index += 1;
    }
    hash
}

const fn mix_number(hash: u64, number: u64) -> u64 {
    mix(hash, &number.to_le_bytes())
}

/// How many rows each table of the regions has.
///
/// The desired region uses `ports` and `containers`, the observed one all four.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Port rows: the size of the host-port pool.
    pub ports: u32,
    /// Container rows.
    pub containers: u32,
    /// Accelerator rows.
    pub accelerators: u32,
    /// Process rows of one bank (there are two); see [`Sizes::processes_of`].
    pub processes: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            ports: 1_001,
            containers: 1_024,
            accelerators: 64,
            processes: Self::processes_of(1_024),
        }
    }
}

impl Sizes {
    /// The most rows a region may claim; a reader maps nothing larger.
    pub const LIMIT: Self = Self {
        ports: 131_072,
        containers: 16_384,
        accelerators: 1_024,
        processes: 262_144,
    };

    /// Process rows that suit so many containers: 32 for each, since most have a few, and a share of
    /// what others leave for those that have hundreds.
    #[must_use]
    pub const fn processes_of(containers: u32) -> u32 {
        match containers.saturating_mul(32) {
            few if few < 16_384 => 16_384,
            many if many > Self::LIMIT.processes => Self::LIMIT.processes,
            suiting => suiting,
        }
    }

    /// The larger of both, table by table.
    #[must_use]
    pub fn grown_to(self, other: Self) -> Self {
        Self {
            ports: self.ports.max(other.ports),
            containers: self.containers.max(other.containers),
            accelerators: self.accelerators.max(other.accelerators),
            processes: self.processes.max(other.processes),
        }
    }

    /// Whether every table has at least one row and none is beyond [`Sizes::LIMIT`].
    #[must_use]
    pub fn are_possible(self) -> bool {
        let within = |value, limit| (1..=limit).contains(&value);
        within(self.ports, Self::LIMIT.ports)
            && within(self.containers, Self::LIMIT.containers)
            && within(self.accelerators, Self::LIMIT.accelerators)
            && within(self.processes, Self::LIMIT.processes)
    }
}

/// Which of the two regions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegionKind {
    /// Written by control.
    Desired,
    /// Written by the dataplane.
    Observed,
}

impl RegionKind {
    pub(crate) const fn code(self) -> u32 {
        match self {
            Self::Desired => 1,
            Self::Observed => 2,
        }
    }

    /// The file's name inside the writer's directory.
    #[must_use]
    pub const fn file_name(self) -> &'static str {
        match self {
            Self::Desired => "desired",
            Self::Observed => "observed",
        }
    }

    /// The tables of this region, in file order.
    pub(crate) fn tables(self, sizes: Sizes) -> Vec<Table> {
        let cells = |name, payload_bytes: usize, rows: u32| (name, payload_bytes, rows);
        let list = match self {
            Self::Desired => vec![
                cells("ports", RawPort::INFO.size, sizes.ports),
                cells("containers", RawContainer::INFO.size, sizes.containers),
                cells("node", RawNode::INFO.size, 1),
            ],
            Self::Observed => vec![
                cells("applied", RawApplied::INFO.size, 1),
                cells("ports", RawPortStatus::INFO.size, sizes.ports),
                cells("containers", RawSample::INFO.size, sizes.containers),
                cells(
                    "accelerators",
                    RawAccelerator::INFO.size,
                    sizes.accelerators,
                ),
                cells("node", RawNodeSample::INFO.size, 1),
                // One cell whose two slots are the two banks.
                cells(
                    "processes",
                    RawBank::INFO.size + sizes.processes as usize * RawProcess::INFO.size,
                    1,
                ),
            ],
        };
        let mut offset = HEADER_BYTES;
        list.into_iter()
            .enumerate()
            .map(|(index, (name, payload_bytes, rows))| {
                let payload_words = payload_bytes / 8;
                let stride =
                    (crate::cell::words_for(payload_words) * 8).next_multiple_of(ROW_ALIGNMENT);
                let table = Table {
                    name,
                    index,
                    offset_words: offset / 8,
                    stride_words: stride / 8,
                    payload_words,
                    rows,
                };
                offset += stride * rows as usize;
                table
            })
            .collect()
    }
}

/// Where a table lies in its region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) name: &'static str,
    /// Place in its region.
    pub(crate) index: usize,
    pub(crate) offset_words: usize,
    pub(crate) stride_words: usize,
    pub(crate) payload_words: usize,
    pub(crate) rows: u32,
}

impl Table {
    /// Words of the region up to and including this table.
    pub(crate) fn end_words(&self) -> usize {
        self.offset_words + self.stride_words * self.rows as usize
    }
}
