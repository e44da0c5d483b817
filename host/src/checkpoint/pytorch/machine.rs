//! The pickle machine: a stack, a memo and the instructions that `torch.save` writes (protocols 2 to 5). It builds
//! values and runs no code; see [`super::globals`] for the calls that it knows the meaning of.
//!
//! Each instruction costs a bounded time, and together they make at most [`MAX_VALUES`] values.

use std::collections::HashMap;

use super::globals::{self, Global};
use super::value::{Id, Node, Pickle};

/// About 45 are charged for a tensor: 180,000 tensors fit; as many values take 300 MB.
const MAX_VALUES: usize = 8 << 20;

/// Reads a pickle.
///
/// # Errors
/// In words, for whatever is cut off, malformed, not allowed or too large.
pub(super) fn read(input: &[u8]) -> Result<Pickle, String> {
    let mut machine = Machine {
        input,
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        nodes: Vec::new(),
        n_values: 0,
    };
    loop {
        let at = machine.at;
        match machine.step() {
            Ok(None) => {}
            Ok(Some(root)) => {
                return Ok(Pickle {
                    nodes: machine.nodes,
                    root,
                });
            }
            Err(why) => return Err(format!("at byte {at} of its pickle: {why}")),
        }
    }
}

struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    nodes: Vec<Node>,
    n_values: usize,
}

impl<'a> Machine<'a> {
    /// Executes an instruction; returns the result after the last one.
    fn step(&mut self) -> Result<Option<Id>, String> {
        let op = self.byte()?;
        match op {
            b'.' => return self.pop().map(Some),
            // PROTO, FRAME: nothing depends on them.
            0x80 => self.byte().map(drop)?,
            0x95 => self.take(8).map(drop)?,
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                // POP takes a mark, if one is on top.
                if self.marks.last() == Some(&self.stack.len()) {
                    self.marks.pop();
                } else {
                    self.pop()?;
                }
            }
            b'1' => self.pop_to_mark().map(drop)?,
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            b'q' | b'r' | 0x94 | b'h' | b'j' => self.memo(op)?,
            b'c' | 0x93 | b'R' | 0x81 | b'b' | b'Q' => self.object(op)?,
            b']' | b'}' | b')' | 0x8f | b't' | 0x85..=0x87 | b'l' | b'd' | 0x91 => self.make(op)?,
            b'a' | b'e' | b's' | b'u' | 0x90 => self.extend(op)?,
            _ => {
                let node = self.scalar(op)?;
                self.push(node)?;
            }
        }
        Ok(None)
    }

    /// `None`, numbers, texts, bytes.
    fn scalar(&mut self, op: u8) -> Result<Node, String> {
        Ok(match op {
            b'N' => Node::None,
            0x88 => Node::Bool(true),
            0x89 => Node::Bool(false),
            b'J' => Node::Int(i32::from_le_bytes(self.word()?).into()),
            b'K' => Node::Int(self.byte()?.into()),
            b'M' => Node::Int(u16::from_le_bytes(self.word()?).into()),
            0x8a => {
                let n_bytes = usize::from(self.byte()?);
                Node::Int(long(self.take(n_bytes)?)?)
            }
            b'G' => Node::Float(f64::from_be_bytes(self.word()?)),
            b'X' | 0x8c | 0x8d => {
                let n_bytes = match op {
                    b'X' => u32::from_le_bytes(self.word()?).into(),
                    0x8c => self.byte()?.into(),
                    _ => u64::from_le_bytes(self.word()?),
                };
                let bytes = self.take_long(n_bytes)?;
                let text = std::str::from_utf8(bytes).map_err(|_| "a text is not UTF-8")?;
                Node::Text(text.into())
            }
            b'B' | b'C' | 0x8e => {
                let n_bytes = match op {
                    b'B' => u32::from_le_bytes(self.word()?).into(),
                    b'C' => self.byte()?.into(),
                    _ => u64::from_le_bytes(self.word()?),
                };
                Node::Bytes(self.take_long(n_bytes)?.into())
            }
            _ => {
                return Err(format!(
                    "instruction 0x{op:02x} is not one that `torch.save` writes"
                ));
            }
        })
    }

    /// Empty containers, and those made of what is on the stack.
    fn make(&mut self, op: u8) -> Result<(), String> {
        let node = match op {
            b']' => Node::List(Vec::new()),
            b'}' => Node::Dict(Vec::new()),
            b')' => Node::Tuple(Box::default()),
            0x8f => Node::Set(Vec::new()),
            b't' => Node::Tuple(self.pop_to_mark()?.into()),
            b'l' => Node::List(self.pop_to_mark()?),
            0x91 => Node::Set(self.pop_to_mark()?),
            b'd' => Node::Dict(pairs(&self.pop_to_mark()?)?),
            // TUPLE1, TUPLE2, TUPLE3.
            _ => {
                let mut items = Vec::new();
                for _ in 0..=(op - 0x85) {
                    items.push(self.pop()?);
                }
                items.reverse();
                Node::Tuple(items.into())
            }
        };
        self.push(node)
    }

    /// Adds what is on the stack to the container below it.
    fn extend(&mut self, op: u8) -> Result<(), String> {
        let items = match op {
            b'a' => vec![self.pop()?],
            b's' => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
            _ => self.pop_to_mark()?,
        };
        self.charge(items.len())?;
        let Id(top) = self.top()?;
        match (op, &mut self.nodes[top as usize]) {
            (b'a' | b'e', Node::List(list)) => list.extend(items),
            (0x90, Node::Set(set)) => set.extend(items),
            (b's' | b'u', Node::Dict(dict)) => dict.extend(pairs(&items)?),
            (_, other) => return Err(format!("items are added to a {}", other.kind())),
        }
        Ok(())
    }

    fn memo(&mut self, op: u8) -> Result<(), String> {
        let key = match op {
            b'q' | b'h' => self.byte()?.into(),
            b'r' | b'j' => u32::from_le_bytes(self.word()?),
            _ => u32::try_from(self.memo.len()).map_err(|_| "too many values")?,
        };
        if matches!(op, b'h' | b'j') {
            let id = self.memo.get(&key).copied();
            let id = id.ok_or_else(|| format!("value {key} is used before it is made"))?;
            self.stack.push(id);
        } else {
            let top = self.top()?;
            self.memo.insert(key, top);
        }
        Ok(())
    }

    /// Names, calls and storages.
    fn object(&mut self, op: u8) -> Result<(), String> {
        match op {
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                let global = Global::find(module, name)?;
                self.push(Node::Global(global))
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Node::Text(module), Node::Text(name)) = (self.node(module), self.node(name))
                else {
                    return Err("a name is not a text".to_owned());
                };
                let global = Global::find(module, name)?;
                self.push(Node::Global(global))
            }
            b'R' | 0x81 => {
                let (args, callee) = (self.pop()?, self.pop()?);
                let (&Node::Global(global), Node::Tuple(args)) =
                    (self.node(callee), self.node(args))
                else {
                    let (callee, args) = (self.node(callee).kind(), self.node(args).kind());
                    return Err(format!("a {callee} is called with a {args}"));
                };
                let size = globals::call_size(args, &self.nodes);
                let args = args.clone();
                self.charge(size)?;
                let node = global.call(&args, &self.nodes)?;
                self.push(node)
            }
            b'b' => {
                let state = self.pop()?;
                let target = self.top()?;
                self.build(target, state)
            }
            _ => {
                let id = self.pop()?;
                let node = globals::storage(self.node(id), &self.nodes)?;
                self.push(node)
            }
        }
    }

    /// Sets attributes. Those of a mapping (`_metadata` of a state dict) are of no use here; those of a numpy type say
    /// the byte order.
    fn build(&mut self, target: Id, state: Id) -> Result<(), String> {
        match (self.node(target), self.node(state)) {
            (Node::Dict(_), _) => Ok(()),
            (Node::NumpyType(_), Node::Tuple(state)) => match state.get(1).map(|&id| self.node(id))
            {
                Some(Node::Text(order)) if matches!(order.as_ref(), "<" | "|" | "=") => Ok(()),
                _ => Err("a numpy number is not little endian".to_owned()),
            },
            (target, _) => Err(format!("attributes of a {} are set", target.kind())),
        }
    }

    fn node(&self, Id(id): Id) -> &Node {
        &self.nodes[id as usize]
    }

    fn push(&mut self, node: Node) -> Result<(), String> {
        self.charge(1)?;
        let id = u32::try_from(self.nodes.len()).map_err(|_| "too many values")?;
        self.nodes.push(node);
        self.stack.push(Id(id));
        Ok(())
    }

    fn charge(&mut self, n_values: usize) -> Result<(), String> {
        self.n_values = self.n_values.saturating_add(n_values);
        if self.n_values > MAX_VALUES {
            return Err(format!("more than {MAX_VALUES} values"));
        }
        Ok(())
    }

    /// The bottom of what may be popped: a mark ends it.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Id, String> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn top(&self) -> Result<Id, String> {
        match self.stack.last() {
            Some(&top) if self.stack.len() > self.floor() => Ok(top),
            _ => Err("a value is used that is not there".to_owned()),
        }
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or("a mark is missing")?;
        let items = self.stack.split_off(mark);
        self.charge(items.len())?;
        Ok(items)
    }

    fn byte(&mut self) -> Result<u8, String> {
        self.word::<1>().map(|[byte]| byte)
    }

    fn word<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let bytes = self.take(N)?;
        bytes.try_into().map_err(|_| "it is cut off".to_owned())
    }

    fn take_long(&mut self, n_bytes: u64) -> Result<&'a [u8], String> {
        let n_bytes = usize::try_from(n_bytes).map_err(|_| "it is cut off")?;
        self.take(n_bytes)
    }

    fn take(&mut self, n_bytes: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(n_bytes);
        let bytes = end.and_then(|end| self.input.get(self.at..end));
        let bytes = bytes.ok_or("it is cut off")?;
        self.at += n_bytes;
        Ok(bytes)
    }

    /// A text up to the end of the line.
    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.input[self.at..];
        let end = rest.iter().position(|&byte| byte == b'\n');
        let line = self.take(end.ok_or("it is cut off")?)?;
        self.at += 1;
        std::str::from_utf8(line).map_err(|_| "a name is not UTF-8".to_owned())
    }
}

fn pairs(items: &[Id]) -> Result<Vec<(Id, Id)>, String> {
    let (pairs, []) = items.as_chunks::<2>() else {
        return Err("a key has no value".to_owned());
    };
    Ok(pairs.iter().map(|&[key, value]| (key, value)).collect())
}

/// Two's complement, little endian.
fn long(bytes: &[u8]) -> Result<i128, String> {
    if bytes.len() > 16 {
        return Err(format!("an integer has {} bytes", bytes.len()));
    }
    let is_negative = bytes.last().is_some_and(|&byte| byte > 127);
    let mut wide = [if is_negative { u8::MAX } else { 0 }; 16];
    wide[..bytes.len()].copy_from_slice(bytes);
    Ok(i128::from_le_bytes(wide))
}
