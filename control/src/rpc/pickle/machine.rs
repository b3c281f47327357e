//! The stack machine that turns a pickle into an arena of plain nodes.
//!
//! In: bytes; out: nodes that refer to each other by index. Only opcodes CPython's protocol 4 and
//! 5 writers use for our shapes are known; anything else is an error. Invariant: every index in a
//! node is below the arena's length.

/// Why a pickle was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PickleError {
    /// Longer than the limit of its kind.
    #[error("the pickle is too large")]
    TooLarge,
    /// Ends before its STOP.
    #[error("the pickle ends early")]
    Truncated,
    /// Bytes after STOP.
    #[error("bytes follow the end of the pickle")]
    Trailing,
    /// An opcode that is not on the list.
    #[error("pickle opcode 0x{0:02x} is not allowed")]
    Opcode(u8),
    /// A protocol other than 2 to 5.
    #[error("pickle protocol {0} is not supported")]
    Protocol(u8),
    /// A class that is not on the list.
    #[error("class {module}.{name} is not allowed in a pickle")]
    Class {
        /// Module of the class.
        module: String,
        /// Name of the class in its module.
        name: String,
    },
    /// The stack, the memo or the marks do not fit the opcode.
    #[error("the pickle's stack is inconsistent")]
    Stack,
    /// Text that is not UTF-8.
    #[error("text in the pickle is not UTF-8")]
    Text,
    /// The object is not what the ext code announces; says what was expected.
    #[error("the pickle does not hold {0}")]
    Shape(&'static str),
}

/// Index of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Id(usize);

/// One pickled object, with its parts as indexes.
#[derive(Clone, Debug)]
pub(super) enum Node {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(String),
    Bytes,
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Set,
    Class {
        module: String,
        name: String,
    },
    Object {
        class: Id,
        args: Id,
        state: Option<Id>,
    },
}

/// An object with its class and arguments looked up.
#[derive(Debug)]
pub(super) struct Instance<'a> {
    pub(super) module: &'a str,
    pub(super) name: &'a str,
    pub(super) args: &'a [Id],
    pub(super) state: Option<Id>,
}

/// All objects of one pickle.
#[derive(Debug)]
pub(super) struct Arena {
    nodes: Vec<Node>,
    root: Id,
}

impl Arena {
    pub(super) fn load(pickle: &[u8], limit: usize) -> Result<Self, PickleError> {
        if pickle.len() > limit {
            return Err(PickleError::TooLarge);
        }
        let mut machine = Machine {
            rest: pickle,
            ..Machine::default()
        };
        while !machine.step()? {}
        if !machine.rest.is_empty() {
            return Err(PickleError::Trailing);
        }
        match machine.stack[..] {
            [root] if machine.marks.is_empty() => Ok(Self {
                nodes: machine.nodes,
                root,
            }),
            _ => Err(PickleError::Stack),
        }
    }

    pub(super) fn root(&self) -> Id {
        self.root
    }

    pub(super) fn node(&self, id: Id) -> &Node {
        &self.nodes[id.0]
    }

    /// Module, class name, constructor arguments and state of an object.
    pub(super) fn object(&self, id: Id) -> Result<Instance<'_>, PickleError> {
        let Node::Object { class, args, state } = self.node(id) else {
            return Err(PickleError::Shape("an object"));
        };
        match (self.node(*class), self.node(*args)) {
            (Node::Class { module, name }, Node::Tuple(args)) => Ok(Instance {
                module,
                name,
                args,
                state: *state,
            }),
            _ => Err(PickleError::Shape("an object of a class")),
        }
    }

    /// Constructor arguments and state of an object that must be of the given class.
    pub(super) fn instance(
        &self,
        id: Id,
        module: &str,
        name: &'static str,
    ) -> Result<(&[Id], Option<Id>), PickleError> {
        let found = self.object(id)?;
        if (found.module, found.name) == (module, name) {
            Ok((found.args, found.state))
        } else {
            Err(PickleError::Shape(name))
        }
    }

    /// The value under a text key of a dict; the last of equal keys counts.
    pub(super) fn entry(&self, dict: Id, key: &str) -> Result<Option<Id>, PickleError> {
        let Node::Dict(pairs) = self.node(dict) else {
            return Err(PickleError::Shape("a dict of attributes"));
        };
        let found = pairs
            .iter()
            .rev()
            .find(|(candidate, _)| matches!(self.node(*candidate), Node::Str(text) if text == key));
        Ok(found.map(|(_, value)| *value))
    }
}

#[derive(Debug, Default)]
struct Machine<'a> {
    rest: &'a [u8],
    nodes: Vec<Node>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: Vec<Id>,
}

impl Machine<'_> {
    /// Runs one opcode; true after STOP.
    fn step(&mut self) -> Result<bool, PickleError> {
        let [opcode] = self.take_array()?;
        match opcode {
            0x80 => match self.take_array()? {
                [2..=5] => {}
                [other] => return Err(PickleError::Protocol(other)),
            },
            // FRAME is only a hint for buffered readers.
            0x95 => drop(self.take(8)?),
            0x2e => return Ok(true),
            b'N' => self.push(Node::None),
            0x88 => self.push(Node::Bool(true)),
            0x89 => self.push(Node::Bool(false)),
            b'K' => {
                let [byte] = self.take_array()?;
                self.push(Node::Int(i128::from(byte)));
            }
            b'M' => {
                let number = u16::from_le_bytes(self.take_array()?);
                self.push(Node::Int(i128::from(number)));
            }
            b'J' => {
                let number = i32::from_le_bytes(self.take_array()?);
                self.push(Node::Int(i128::from(number)));
            }
            0x8a => {
                let [length] = self.take_array()?;
                let number = little_endian(self.take(usize::from(length))?)?;
                self.push(Node::Int(number));
            }
            b'G' => {
                let number = f64::from_be_bytes(self.take_array()?);
                self.push(Node::Float(number));
            }
            0x8c => {
                let [length] = self.take_array()?;
                self.text(usize::from(length))?;
            }
            b'X' => {
                let length = u32::from_le_bytes(self.take_array()?);
                self.text(usize::try_from(length).map_err(|_| PickleError::Truncated)?)?;
            }
            b'C' => {
                let [length] = self.take_array()?;
                self.take(usize::from(length))?;
                self.push(Node::Bytes);
            }
            b')' => self.push(Node::Tuple(Vec::new())),
            0x85..=0x87 => {
                let length = usize::from(opcode - 0x84);
                let items = self.pop_many(length)?;
                self.push(Node::Tuple(items));
            }
            b'(' => self.marks.push(self.stack.len()),
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Node::Tuple(items));
            }
            b'}' => self.push(Node::Dict(Vec::new())),
            b's' => {
                let pair = self.pop_many(2)?;
                self.extend_dict(&pair)?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.extend_dict(&items)?;
            }
            b']' => self.push(Node::List(Vec::new())),
            b'a' => {
                let items = self.pop_many(1)?;
                self.extend_list(items)?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.extend_list(items)?;
            }
            0x8f => self.push(Node::Set),
            0x90 => {
                self.pop_to_mark()?;
                match self.top()? {
                    Node::Set => {}
                    _ => return Err(PickleError::Stack),
                }
            }
            0x91 => {
                self.pop_to_mark()?;
                self.push(Node::Set);
            }
            0x93 => self.class()?,
            0x52 | 0x81 => self.object()?,
            0x62 => self.build()?,
            0x94 => {
                let top = *self.reachable().last().ok_or(PickleError::Stack)?;
                self.memo.push(top);
            }
            b'h' => {
                let [index] = self.take_array()?;
                self.recall(usize::from(index))?;
            }
            b'j' => {
                let index = u32::from_le_bytes(self.take_array()?);
                self.recall(usize::try_from(index).map_err(|_| PickleError::Stack)?)?;
            }
            other => return Err(PickleError::Opcode(other)),
        }
        Ok(false)
    }

    fn take(&mut self, length: usize) -> Result<&[u8], PickleError> {
        let (taken, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or(PickleError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    fn take_array<const N: usize>(&mut self) -> Result<[u8; N], PickleError> {
        let (taken, rest) = self
            .rest
            .split_first_chunk()
            .ok_or(PickleError::Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    fn text(&mut self, length: usize) -> Result<(), PickleError> {
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| PickleError::Text)?;
        let text = text.to_owned();
        self.push(Node::Str(text));
        Ok(())
    }

    fn push(&mut self, node: Node) {
        let id = Id(self.nodes.len());
        self.nodes.push(node);
        self.stack.push(id);
    }

    /// The part of the stack above the last mark; what lies below belongs to an open collection.
    fn reachable(&self) -> &[Id] {
        &self.stack[self.marks.last().copied().unwrap_or(0)..]
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Id>, PickleError> {
        if self.reachable().len() < count {
            return Err(PickleError::Stack);
        }
        Ok(self.stack.split_off(self.stack.len() - count))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, PickleError> {
        let mark = self.marks.pop().ok_or(PickleError::Stack)?;
        Ok(self.stack.split_off(mark))
    }

    fn top(&mut self) -> Result<&mut Node, PickleError> {
        let id = *self.reachable().last().ok_or(PickleError::Stack)?;
        Ok(&mut self.nodes[id.0])
    }

    fn extend_dict(&mut self, items: &[Id]) -> Result<(), PickleError> {
        let (pairs, rest) = items.as_chunks::<2>();
        match self.top()? {
            Node::Dict(entries) if rest.is_empty() => {
                entries.extend(pairs.iter().map(|[key, value]| (*key, *value)));
                Ok(())
            }
            _ => Err(PickleError::Stack),
        }
    }

    fn extend_list(&mut self, items: Vec<Id>) -> Result<(), PickleError> {
        match self.top()? {
            Node::List(list) => {
                list.extend(items);
                Ok(())
            }
            _ => Err(PickleError::Stack),
        }
    }

    fn class(&mut self) -> Result<(), PickleError> {
        let parts = self.pop_many(2)?;
        let [Node::Str(module), Node::Str(name)] =
            [&self.nodes[parts[0].0], &self.nodes[parts[1].0]]
        else {
            return Err(PickleError::Stack);
        };
        let (module, name) = (module.clone(), name.clone());
        let known = (module.as_str(), name.as_str()) == ("decimal", "Decimal")
            || is_path(&module)
            || module.starts_with("ai.backend.");
        if !known {
            return Err(PickleError::Class { module, name });
        }
        self.push(Node::Class { module, name });
        Ok(())
    }

    fn object(&mut self) -> Result<(), PickleError> {
        let parts = self.pop_many(2)?;
        let (class, args) = (parts[0], parts[1]);
        match (&self.nodes[class.0], &self.nodes[args.0]) {
            (Node::Class { .. }, Node::Tuple(_)) => {
                self.push(Node::Object {
                    class,
                    args,
                    state: None,
                });
                Ok(())
            }
            _ => Err(PickleError::Stack),
        }
    }

    fn build(&mut self) -> Result<(), PickleError> {
        let new_state = self.pop_many(1)?[0];
        match self.top()? {
            Node::Object {
                state: state @ None,
                ..
            } => {
                *state = Some(new_state);
                Ok(())
            }
            _ => Err(PickleError::Stack),
        }
    }

    fn recall(&mut self, index: usize) -> Result<(), PickleError> {
        let id = *self.memo.get(index).ok_or(PickleError::Stack)?;
        self.stack.push(id);
        Ok(())
    }
}

/// Whether a module has the classes of paths; Python 3.13 calls it by its inner name.
pub(super) fn is_path(module: &str) -> bool {
    matches!(module, "pathlib" | "pathlib._local")
}

/// A two's complement integer of up to 16 bytes.
fn little_endian(bytes: &[u8]) -> Result<i128, PickleError> {
    if bytes.len() > 16 {
        return Err(PickleError::Shape("an integer of at most 128 bits"));
    }
    let fill = if bytes.last().is_some_and(|byte| byte & 0x80 != 0) {
        0xff
    } else {
        0
    };
    let mut word = [fill; 16];
    word[..bytes.len()].copy_from_slice(bytes);
    Ok(i128::from_le_bytes(word))
}
