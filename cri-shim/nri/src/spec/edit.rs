//! Edits of JSON documents: places made where they are missing, and NRI's rule that a name with a
//! leading `-` is a removal.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// The object at a path, made where it is missing.
pub(super) fn object<'a>(value: &'a mut Value, path: &[&str]) -> &'a mut Map<String, Value> {
    let mut at = value;
    for key in path {
        if !at.is_object() {
            *at = json!({});
        }
        at = at.as_object_mut().map(|map| map.entry(*key).or_insert(json!({}))).unwrap_or_else(
            // It was made an object just now.
            || unreachable!("an object"),
        );
    }
    if !at.is_object() {
        *at = json!({});
    }
    match at {
        Value::Object(map) => map,
        _ => unreachable!("an object"),
    }
}

pub(super) fn array<'a>(value: &'a mut Value, path: &[&str]) -> &'a mut Vec<Value> {
    let (last, parents) = path.split_last().unwrap_or((&"", &[]));
    let slot = object(value, parents).entry(*last).or_insert(json!([]));
    if !slot.is_array() {
        *slot = json!([]);
    }
    match slot {
        Value::Array(list) => list,
        _ => unreachable!("an array"),
    }
}

pub(super) fn edit_map<T>(
    into: &mut Map<String, Value>,
    from: &BTreeMap<String, T>,
    value: fn(&T) -> Value,
) {
    for removed in from.keys().filter_map(|key| key.strip_prefix('-')) {
        into.remove(removed);
    }
    for (key, item) in from.iter().filter(|(key, _)| !key.starts_with('-')) {
        into.insert(key.clone(), value(item));
    }
}

/// Removes what is named with a leading `-`, and puts the others in the place of their like.
pub(super) fn edit_list<T>(
    into: &mut Vec<Value>,
    from: &[T],
    key: &str,
    name: fn(&T) -> &str,
    value: impl Fn(&T) -> Value,
) {
    for item in from {
        let named = name(item);
        let bare = named.strip_prefix('-').unwrap_or(named);
        into.retain(|other| other.get(key).and_then(Value::as_str) != Some(bare));
        if bare == named {
            into.push(value(item));
        }
    }
}

pub(super) fn drop_if_empty(spec: &mut Value, key: &str) {
    let linux = object(spec, &["linux"]);
    if linux.get(key).and_then(Value::as_object).is_some_and(Map::is_empty) {
        linux.remove(key);
    }
}
