//! What the kernel and its modules say of their types (BTF, linux/btf.h).
//!
//! In: the bytes of `/sys/kernel/btf/vmlinux` and, for a module's types, those of the module, which go on
//! from them. Out: where a structure has its members. Invariant: any bytes are survived; what makes no
//! sense is not there.

const MAGIC: u16 = 0xeb9f;

const INT: u32 = 1;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;

/// Deepest nesting of types that is followed.
const DEEPEST: usize = 16;

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_ne_bytes(field.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(field.try_into().ok()?))
}

fn usize_at(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32_at(bytes, at)?).ok()
}

/// One file.
#[derive(Debug)]
struct Part<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Where each type begins.
    starts: Vec<usize>,
}

impl<'a> Part<'a> {
    fn of(bytes: &'a [u8]) -> Option<Self> {
        (u16_at(bytes, 0)? == MAGIC).then_some(())?;
        let header = usize_at(bytes, 4)?;
        let section = |at: usize| {
            let start = header.checked_add(usize_at(bytes, at)?)?;
            bytes.get(start..start.checked_add(usize_at(bytes, at + 4)?)?)
        };
        let types = section(8)?;
        let mut starts = Vec::new();
        let mut at = 0;
        while at < types.len() {
            starts.push(at);
            let info = u32_at(types, at + 4)?;
            let members = usize::try_from(info & 0xffff).ok()?;
            at += 12
                + match info >> 24 & 0x1f {
                    INT | VAR | DECL_TAG => 4,
                    ARRAY => 12,
                    STRUCT | UNION | DATASEC | ENUM64 => 12 * members,
                    ENUM | FUNC_PROTO => 8 * members,
                    kind if kind > ENUM64 => return None,
                    _ => 0,
                };
        }
        Some(Self {
            types,
            strings: section(16)?,
            starts,
        })
    }
}

/// The kernel's types, and those of one of its modules.
#[derive(Debug)]
pub struct Types<'a> {
    kernel: Part<'a>,
    module: Option<Part<'a>>,
}

#[derive(Clone, Copy)]
struct Type<'a> {
    name: &'a [u8],
    kind: u32,
    /// Offsets of members hold the sizes of bit fields too.
    bits: bool,
    members: usize,
    /// Its size, or the type it stands for.
    size: u32,
    rest: &'a [u8],
}

impl<'a> Types<'a> {
    /// The kernel's types, and those of a module that go on from them; none when they make no sense.
    pub fn of(kernel: &'a [u8], module: Option<&'a [u8]>) -> Option<Self> {
        let kernel = Part::of(kernel)?;
        let module = match module {
            Some(bytes) => Some(Part::of(bytes)?),
            None => None,
        };
        Some(Self { kernel, module })
    }

    fn name(&self, at: usize) -> Option<&'a [u8]> {
        let (strings, at) = match at.checked_sub(self.kernel.strings.len()) {
            Some(at) => (self.module.as_ref()?.strings, at),
            None => (self.kernel.strings, at),
        };
        let rest = strings.get(at..)?;
        rest.get(..rest.iter().position(|byte| *byte == 0)?)
    }

    /// The type of this number; 0 is that of nothing.
    fn by_number(&self, number: usize) -> Option<Type<'a>> {
        let place = number.checked_sub(1)?;
        let (part, place) = match place.checked_sub(self.kernel.starts.len()) {
            Some(place) => (self.module.as_ref()?, place),
            None => (&self.kernel, place),
        };
        let bytes = part.types.get(*part.starts.get(place)?..)?;
        let info = u32_at(bytes, 4)?;
        Some(Type {
            name: self.name(usize_at(bytes, 0)?)?,
            kind: info >> 24 & 0x1f,
            bits: info >> 31 != 0,
            members: usize::try_from(info & 0xffff).ok()?,
            size: u32_at(bytes, 8)?,
            rest: bytes.get(12..)?,
        })
    }

    /// A module's own first.
    fn structure(&self, name: &str) -> Option<Type<'a>> {
        let first = self.kernel.starts.len() + 1;
        let own = self.module.as_ref().map_or(0, |part| part.starts.len());
        let mut all = (first..first + own).chain(1..first);
        all.find_map(|number| {
            let it = self.by_number(number)?;
            (it.kind == STRUCT && it.name == name.as_bytes()).then_some(it)
        })
    }

    fn behind_names(&self, number: usize) -> Option<Type<'a>> {
        let mut it = self.by_number(number)?;
        for _ in 0..DEEPEST {
            match it.kind {
                TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG => {
                    it = self.by_number(usize::try_from(it.size).ok()?)?;
                }
                _ => return Some(it),
            }
        }
        None
    }

    /// A member, also of nameless structures and unions inside: its place in bits, and its type.
    fn member(&self, of: Type<'a>, name: &str, depth: usize) -> Option<(u64, usize)> {
        if !matches!(of.kind, STRUCT | UNION) || depth > DEEPEST {
            return None;
        }
        for number in 0..of.members {
            let at = 12 * number;
            let own = self.name(usize_at(of.rest, at)?)?;
            let inner = usize_at(of.rest, at + 4)?;
            let mask = if of.bits { 0x00ff_ffff } else { u32::MAX };
            let place = u64::from(u32_at(of.rest, at + 8)? & mask);
            if own == name.as_bytes() {
                return Some((place, inner));
            }
            if own.is_empty()
                && let Some(nested) = self.behind_names(inner)
                && let Some((further, found)) = self.member(nested, name, depth + 1)
            {
                return Some((place + further, found));
            }
        }
        None
    }

    /// Where a structure has a member, or a member of that, and so on: bytes from its start. None when there
    /// is no such member, or one that begins within a byte.
    pub fn place(&self, structure: &str, path: &[&str]) -> Option<u64> {
        let mut inside = self.structure(structure)?;
        let mut bits = 0;
        for (depth, name) in path.iter().enumerate() {
            if depth > 0 && !matches!(inside.kind, STRUCT | UNION) {
                return None;
            }
            let (place, number) = self.member(inside, name, 0)?;
            bits += place;
            if depth + 1 < path.len() {
                inside = self.behind_names(number)?;
            }
        }
        (bits % 8 == 0).then_some(bits / 8)
    }

    /// How long a structure is, bytes.
    pub fn size(&self, structure: &str) -> Option<u64> {
        Some(u64::from(self.structure(structure)?.size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PTR: u32 = 2;

    fn file(types: &[&[u32]], strings: &str) -> Vec<u8> {
        let types: Vec<u8> = types
            .concat()
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap();
        let mut out = MAGIC.to_ne_bytes().to_vec();
        out.extend([1, 0]);
        for word in [
            24,
            0,
            length(&types),
            length(&types),
            length(strings.as_bytes()),
        ] {
            out.extend(word.to_ne_bytes());
        }
        out.extend(types);
        out.extend(strings.as_bytes());
        out
    }

    #[test]
    fn members_are_found_through_names_and_nameless_parts_also_of_a_module() {
        // 1: int; 2: struct inner { int a; int b; }; 3: typedef of it; 4: a nameless union of one;
        // 5: a pointer.
        let strings = "\0inner\0a\0b\0outer_t\0word\0";
        let kernel = file(
            &[
                &[20, INT << 24, 4, 32],
                &[1, STRUCT << 24 | 2, 8, 7, 1, 0, 9, 1, 32],
                &[11, TYPEDEF << 24, 2],
                &[0, UNION << 24 | 1, 8, 19, 3, 0],
                &[0, PTR << 24, 2],
            ],
            strings,
        );
        let own = u32::try_from(strings.len()).unwrap();
        // struct module { int a; union { outer_t word; }; bit field b:8 at bit 100; }
        let module = file(
            &[&[
                own + 1,
                1 << 31 | STRUCT << 24 | 3,
                24,
                7,
                1,
                0,
                0,
                4,
                64,
                own + 8,
                1,
                8 << 24 | 196,
            ]],
            "\0module\0bits\0",
        );
        let types = Types::of(&kernel, Some(&module)).unwrap();
        // "word" begins one further than "outer_t" ends.
        assert_eq!(types.place("inner", &["b"]), Some(4));
        assert_eq!(types.size("inner"), Some(8));
        assert_eq!(types.size("module"), Some(24));
        assert_eq!(types.place("module", &["word", "b"]), Some(12));
        assert_eq!(types.place("module", &["a"]), Some(0));
        assert_eq!(types.place("module", &["bits"]), None, "within a byte");
        assert_eq!(types.place("module", &["a", "b"]), None);
        assert_eq!(types.place("module", &["c"]), None);
        assert_eq!(types.place("none", &["a"]), None);
        assert!(Types::of(&kernel, None).unwrap().size("module").is_none());
    }

    #[test]
    fn this_kernel_tells_where_its_devices_have_their_indexes() {
        let Ok(bytes) = std::fs::read("/sys/kernel/btf/vmlinux") else {
            crate::skip::needs("this kernel tells nothing of its types");
            return;
        };
        let types = Types::of(&bytes, None).unwrap();
        assert!(types.place("net_device", &["ifindex"]).unwrap() > 0);
        assert_eq!(types.place("net_device", &["nobody"]), None);
        assert!(types.size("net_device").unwrap() > 1000);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(mut bytes in proptest::collection::vec(any::<u8>(), 24..400), kinds in any::<u8>()) {
            bytes[..8].copy_from_slice(&[0x9f, 0xeb, 1, 0, 24, 0, 0, 0]);
            for at in [8, 12, 16, 20] {
                bytes[at + 1..at + 4].fill(0);
            }
            bytes[8] &= kinds;
            if let Some(types) = Types::of(&bytes, Some(&bytes)) {
                let _ = types.place("a", &["a", "b"]);
                for number in 0..40 {
                    if let Some(it) = types.by_number(number) {
                        let _ = types.member(it, "a", 0);
                    }
                }
            }
        }
    }
}
