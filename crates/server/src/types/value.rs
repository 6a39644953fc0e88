//! JSON values into Rust's types, with complaints in the words of JSON. Must not know any field's name.

use serde_json::{Map, Value};

/// What a request's field can hold.
pub(crate) trait Field: Sized {
    /// The value, or what is wrong with it, to stand behind the field's name.
    fn read(value: Value) -> Result<Self, String>;
}

/// What a value is, for the end of "must be ..., not".
fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(_) => "true or false".into(),
        Value::Number(number) => number.to_string(),
        Value::String(_) => "a string".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
    }
}

/// The complaint about a value that is no `expected`.
pub(crate) fn must_be(expected: &str, value: &Value) -> String {
    format!("must be {expected}, not {}", kind(value))
}

/// A whole number, written with a fraction of zero or without one.
fn whole(value: &Value) -> Result<i128, String> {
    let number = value.as_i64().map(i128::from).or_else(|| value.as_u64().map(i128::from));
    // Farther from zero a float no longer says which whole number was written.
    let exact =
        |number: &f64| number.fract() == 0.0 && number.abs() <= (1_u64 << f64::MANTISSA_DIGITS) as f64;
    let whole_float = || value.as_f64().filter(exact).map(|number| number as i128);
    let problem = || match value.as_f64() {
        Some(float) if float.fract() == 0.0 => format!("is {value}, which is too far from zero"),
        _ => must_be("a whole number", value),
    };
    number.or_else(whole_float).ok_or_else(problem)
}

macro_rules! whole_numbers {
    ($($number:ty),*) => {$(
        impl Field for $number {
            fn read(value: Value) -> Result<Self, String> {
                Self::try_from(whole(&value)?).map_err(|_| {
                    let (least, most) = (Self::MIN, Self::MAX);
                    format!("is {value}; it must be a whole number from {least} to {most}")
                })
            }
        }
    )*};
}

whole_numbers!(u32, u64, usize, i32, i64);

impl Field for f32 {
    fn read(value: Value) -> Result<Self, String> {
        value.as_f64().map(|number| number as Self).ok_or_else(|| must_be("a number", &value))
    }
}

impl Field for bool {
    fn read(value: Value) -> Result<Self, String> {
        value.as_bool().ok_or_else(|| must_be("true or false", &value))
    }
}

impl Field for String {
    fn read(value: Value) -> Result<Self, String> {
        match value {
            Value::String(text) => Ok(text),
            other => Err(must_be("a string", &other)),
        }
    }
}

impl Field for Value {
    fn read(value: Value) -> Result<Self, String> {
        Ok(value)
    }
}

impl Field for Map<String, Value> {
    fn read(value: Value) -> Result<Self, String> {
        match value {
            Value::Object(map) => Ok(map),
            other => Err(must_be("an object", &other)),
        }
    }
}

impl<T: Field> Field for Vec<T> {
    fn read(value: Value) -> Result<Self, String> {
        let Value::Array(items) = value else { return Err(must_be("a list", &value)) };
        let read = |(i, item)| T::read(item).map_err(|problem| format!("item {i} {problem}"));
        items.into_iter().enumerate().map(read).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn whole_numbers_may_have_a_fraction_of_zero() {
        assert_eq!(u32::read(json!(2.0)), Ok(2));
        assert_eq!(i64::read(json!(-3.0)), Ok(-3));
        assert_eq!(u64::read(json!(u64::MAX)), Ok(u64::MAX));
        assert_eq!(u32::read(json!(1.5)).unwrap_err(), "must be a whole number, not 1.5");
        assert_eq!(
            u32::read(json!(-1)).unwrap_err(),
            "is -1; it must be a whole number from 0 to 4294967295"
        );
        assert!(i64::read(json!(-9_223_372_036_854_775_808.0)).is_err(), "it may have been one less");
        assert_eq!(u64::read(json!(1e30)).unwrap_err(), "is 1e+30, which is too far from zero");
        assert!(usize::read(json!(true)).is_err());
    }

    #[test]
    fn lists_name_the_item() {
        assert_eq!(Vec::<u32>::read(json!([1, 2.0])), Ok(vec![1, 2]));
        assert_eq!(
            Vec::<u32>::read(json!([1, "x"])).unwrap_err(),
            "item 1 must be a whole number, not a string"
        );
        assert_eq!(Vec::<String>::read(json!({})).unwrap_err(), "must be a list, not an object");
    }
}
