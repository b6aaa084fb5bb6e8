//! The CRI messages are the published wire contract: every name, number, type, label and
//! streaming flag.
//!
//! The contract is committed as a listing (`cri-v1.wire.txt`); where the published
//! descriptor set is at hand (`PINION_CRI_DESCRIPTOR`, or `shared/cri` beside the
//! checkout) the two descriptors are compared as well, so the listing cannot drift.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use prost::Message as _;
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet};
use prost_types::{
    FieldDescriptorProto, field_descriptor_proto::Label, field_descriptor_proto::Type,
};
use std::fmt::Write as _;
use std::path::PathBuf;

fn file(set: &[u8], package: &str) -> FileDescriptorProto {
    let set = FileDescriptorSet::decode(set).expect("a descriptor set");
    let found = set.file.into_iter().find(|f| f.package() == package);
    found.unwrap_or_else(|| panic!("no file of package {package}"))
}

fn short(name: &str) -> String {
    name.rsplit('.').next().unwrap_or(name).to_owned()
}

fn type_of(field: &FieldDescriptorProto, message: &DescriptorProto) -> String {
    if field.r#type() == Type::Message {
        let name = short(field.type_name());
        let entry = message.nested_type.iter().find(|n| n.name() == name);
        if let Some(entry) = entry.filter(|e| e.options.as_ref().is_some_and(|o| o.map_entry())) {
            let parts: Vec<String> = entry.field.iter().map(|f| type_of(f, entry)).collect();
            return format!("map<{}>", parts.join(","));
        }
        return name;
    }
    match field.r#type() {
        Type::Enum => short(field.type_name()),
        Type::String => "string".into(),
        Type::Bytes => "bytes".into(),
        Type::Bool => "bool".into(),
        Type::Int32 => "int32".into(),
        Type::Int64 => "int64".into(),
        Type::Uint32 => "uint32".into(),
        Type::Uint64 => "uint64".into(),
        Type::Double => "double".into(),
        other => format!("{other:?}"),
    }
}

fn enum_line(e: &EnumDescriptorProto) -> String {
    let values: Vec<String> =
        e.value.iter().map(|v| format!("{}={}", v.name(), v.number())).collect();
    format!("enum {}: {}", e.name(), values.join(", "))
}

/// One line per RPC, field and enum, in the order of the file.
fn listing(file: &FileDescriptorProto) -> String {
    let mut out = String::new();
    for service in &file.service {
        writeln!(out, "service {}", service.name()).unwrap();
        for m in &service.method {
            assert!(!m.client_streaming(), "{} streams from the client", m.name());
            let stream = if m.server_streaming() { "stream " } else { "" };
            let (input, output) = (short(m.input_type()), short(m.output_type()));
            writeln!(out, "  {}({input}) -> {stream}{output}", m.name()).unwrap();
        }
        out.push('\n');
    }
    for e in &file.enum_type {
        writeln!(out, "{}", enum_line(e)).unwrap();
    }
    out.push('\n');
    for message in &file.message_type {
        writeln!(out, "message {}", message.name()).unwrap();
        for field in &message.field {
            let ty = type_of(field, message);
            let repeated = field.label() == Label::Repeated && !ty.starts_with("map<");
            let label = if repeated { "repeated " } else { "" };
            let old = field.options.as_ref().is_some_and(prost_types::FieldOptions::deprecated);
            let old = if old { " deprecated" } else { "" };
            writeln!(out, "  {} {}: {label}{ty}{old}", field.number(), field.name()).unwrap();
        }
        for e in &message.enum_type {
            writeln!(out, "  {}", enum_line(e)).unwrap();
        }
    }
    out
}

fn lines(text: &str) -> Vec<&str> {
    text.lines().filter(|l| !l.trim().is_empty() && !l.starts_with('#')).collect()
}

#[test]
fn our_cri_is_the_published_wire_contract() {
    let ours = listing(&file(pinion_cri_proto::DESCRIPTORS, "runtime.v1"));
    let contract = include_str!("cri-v1.wire.txt");
    for (ours, theirs) in lines(&ours).iter().zip(lines(contract)) {
        assert_eq!(*ours, theirs);
    }
    assert_eq!(lines(&ours).len(), lines(contract).len());
}

#[test]
fn cri_has_43_rpcs_of_which_7_stream() {
    let file = file(pinion_cri_proto::DESCRIPTORS, "runtime.v1");
    let methods: Vec<_> = file.service.iter().flat_map(|s| &s.method).collect();
    assert_eq!(methods.len(), 43);
    assert_eq!(methods.iter().filter(|m| m.server_streaming()).count(), 7);
}

#[test]
fn the_listing_agrees_with_the_published_descriptor_where_it_is_at_hand() {
    let beside = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared/cri/runtime-v1.descriptor.pb");
    let path = std::env::var_os("PINION_CRI_DESCRIPTOR").map_or(beside, PathBuf::from);
    let Ok(published) = std::fs::read(&path) else {
        println!("not possible here: no descriptor set at {}", path.display());
        return;
    };
    let theirs = listing(&file(&published, "runtime.v1"));
    let ours = listing(&file(pinion_cri_proto::DESCRIPTORS, "runtime.v1"));
    let sorted = |text: &str| {
        let mut all: Vec<String> = lines(text).iter().map(|l| (*l).to_owned()).collect();
        all.sort();
        all
    };
    assert_eq!(sorted(&ours), sorted(&theirs));
}
