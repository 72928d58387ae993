//! Reading CBOR strictly: one item, nothing behind it, maps without repeated labels.

use ciborium::Value;
use coset::CborSerializable as _;

use crate::text::hex;
use crate::token::Malformed;

/// What a value is, for people.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Integer(number) => format!("{}", i128::from(*number)),
        Value::Bytes(bytes) if bytes.len() <= 8 => format!("bytes {}", hex(bytes)),
        Value::Bytes(bytes) => format!("{} bytes", bytes.len()),
        Value::Text(text) if text.len() <= 80 => format!("{text:?}"),
        Value::Text(_) => "a long text".into(),
        Value::Bool(value) => format!("{value}"),
        Value::Null => "null".into(),
        Value::Float(_) => "a floating-point number".into(),
        Value::Tag(tag, _) => format!("something with tag {tag}"),
        Value::Array(items) => format!("an array of {}", items.len()),
        Value::Map(entries) => format!("a map of {}", entries.len()),
        _ => "something else".into(),
    }
}

/// The one item that `bytes` are.
pub(crate) fn item(at: &str, bytes: &[u8]) -> Result<Value, Malformed> {
    Value::from_slice(bytes).map_err(|error| Malformed::new(at, "one CBOR item", &format!("{error}")))
}

/// A map whose labels are integers, and where it is.
pub(crate) struct Map {
    at: String,
    entries: Vec<(i128, Value)>,
}

impl Map {
    pub(crate) fn new(at: &str, value: Value) -> Result<Self, Malformed> {
        let Value::Map(entries) = value else {
            return Err(Malformed::new(at, "a map", &describe(&value)));
        };
        let mut map = Self { at: at.to_owned(), entries: Vec::with_capacity(entries.len()) };
        for (label, value) in entries {
            let Value::Integer(label) = label else {
                return Err(Malformed::new(at, "labels that are integers", &describe(&label)));
            };
            let label = i128::from(label);
            if map.entries.iter().any(|(other, _)| *other == label) {
                return Err(Malformed::new(at, "each label once", &format!("{label} twice")));
            }
            map.entries.push((label, value));
        }
        Ok(map)
    }

    /// Takes what may be there.
    pub(crate) fn optional(&mut self, label: i128) -> Option<Value> {
        let at = self.entries.iter().position(|(found, _)| *found == label)?;
        Some(self.entries.swap_remove(at).1)
    }

    fn required(&mut self, label: i128, name: &str) -> Result<Value, Malformed> {
        self.optional(label).ok_or_else(|| self.wrong(name, &format!("claim {label}"), "nothing"))
    }

    fn wrong(&self, name: &str, expected: &str, found: &str) -> Malformed {
        Malformed::new(&format!("{}, {name}", self.at), expected, found)
    }

    /// Takes a string of bytes with one of these lengths.
    pub(crate) fn bytes(&mut self, label: i128, name: &str, lengths: &[usize]) -> Result<Vec<u8>, Malformed> {
        let value = self.required(label, name)?;
        match value {
            Value::Bytes(bytes) if lengths.is_empty() || lengths.contains(&bytes.len()) => Ok(bytes),
            other => {
                let lengths: Vec<String> = lengths.iter().map(usize::to_string).collect();
                Err(self.wrong(name, &format!("{} bytes", lengths.join(" or ")), &describe(&other)))
            }
        }
    }

    /// Takes a text.
    pub(crate) fn text(&mut self, label: i128, name: &str) -> Result<String, Malformed> {
        match self.required(label, name)? {
            Value::Text(text) => Ok(text),
            other => Err(self.wrong(name, "a text", &describe(&other))),
        }
    }

    /// Takes a text that may be missing.
    pub(crate) fn optional_text(&mut self, label: i128, name: &str) -> Result<Option<String>, Malformed> {
        match self.optional(label) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(name, "a text", &describe(&other))),
        }
    }

    /// Takes a number of 16 bits.
    pub(crate) fn u16(&mut self, label: i128, name: &str) -> Result<u16, Malformed> {
        let value = self.required(label, name)?;
        let number = value.as_integer().and_then(|number| u16::try_from(number).ok());
        number.ok_or_else(|| self.wrong(name, "a number of 16 bits", &describe(&value)))
    }

    /// Takes an array.
    pub(crate) fn array(&mut self, label: i128, name: &str) -> Result<Vec<Value>, Malformed> {
        match self.required(label, name)? {
            Value::Array(items) => Ok(items),
            other => Err(self.wrong(name, "an array", &describe(&other))),
        }
    }
}
