//! The breaking-change check: what `baseline.v1.txt` names must stay as it is. Additions are fine, and are added to the
//! baseline with `RUNNER_UPDATE_BASELINE=1 cargo test -p runner-proto`, which only appends.

use std::{collections::BTreeSet, fs, path::PathBuf};

use prost::Message as _;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet, ServiceDescriptorProto,
    field_descriptor_proto::{Label, Type},
};

const PACKAGE: &str = "runner.v1";
const HEADER: &str = "\
# What callers of runner.v1 rely on: a line for each message, field, enum value, service and method.
# Lines are never removed or changed by hand. `RUNNER_UPDATE_BASELINE=1 cargo test -p runner-proto` appends new ones.
";

fn field_line(message: &str, descriptor: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let kind = match field.r#type() {
        Type::Message | Type::Enum | Type::Group => field.type_name().trim_start_matches('.').to_owned(),
        scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_ascii_lowercase(),
    };
    let label = match field.label() {
        Label::Repeated => "repeated",
        Label::Required => "required",
        Label::Optional if field.proto3_optional() => "optional",
        Label::Optional => "singular",
    };
    // Moving a field into or out of a oneof is a change, too.
    let oneof = match field.oneof_index {
        Some(index) if !field.proto3_optional() => {
            let index = usize::try_from(index).expect("an index");
            format!(" oneof={}", descriptor.oneof_decl[index].name())
        }
        _ => String::new(),
    };
    format!("field {message}.{} = {} {label} {kind}{oneof}", field.name(), field.number())
}

fn enum_lines(prefix: &str, descriptor: &EnumDescriptorProto, lines: &mut BTreeSet<String>) {
    for value in &descriptor.value {
        lines.insert(format!("value {prefix}.{}.{} = {}", descriptor.name(), value.name(), value.number()));
    }
}

fn message_lines(prefix: &str, descriptor: &DescriptorProto, lines: &mut BTreeSet<String>) {
    let name = format!("{prefix}.{}", descriptor.name());
    lines.insert(format!("message {name}"));
    for field in &descriptor.field {
        lines.insert(field_line(&name, descriptor, field));
    }
    for below in &descriptor.enum_type {
        enum_lines(&name, below, lines);
    }
    for below in &descriptor.nested_type {
        message_lines(&name, below, lines);
    }
}

fn service_lines(prefix: &str, descriptor: &ServiceDescriptorProto, lines: &mut BTreeSet<String>) {
    let name = format!("{prefix}.{}", descriptor.name());
    lines.insert(format!("service {name}"));
    for method in &descriptor.method {
        let stream = |yes: bool| if yes { "stream " } else { "" };
        lines.insert(format!(
            "method {name}.{}({}{}) returns ({}{})",
            method.name(),
            stream(method.client_streaming()),
            method.input_type().trim_start_matches('.'),
            stream(method.server_streaming()),
            method.output_type().trim_start_matches('.'),
        ));
    }
}

fn describe(set: &FileDescriptorSet) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    for file in set.file.iter().filter(|file| file.package() == PACKAGE) {
        file.message_type.iter().for_each(|message| message_lines(PACKAGE, message, &mut lines));
        file.enum_type.iter().for_each(|descriptor| enum_lines(PACKAGE, descriptor, &mut lines));
        file.service.iter().for_each(|service| service_lines(PACKAGE, service, &mut lines));
    }
    lines
}

fn parse(baseline: &str) -> BTreeSet<String> {
    baseline.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned).collect()
}

/// Lines that callers rely on and that are gone, and lines that are new.
fn compare(baseline: &BTreeSet<String>, now: &BTreeSet<String>) -> (Vec<String>, Vec<String>) {
    (baseline.difference(now).cloned().collect(), now.difference(baseline).cloned().collect())
}

#[test]
fn the_contract_only_grows() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("baseline.v1.txt");
    let set = FileDescriptorSet::decode(runner_proto::FILE_DESCRIPTOR_SET).expect("the descriptors decode");
    let now = describe(&set);
    assert!(now.len() > 100, "the walk found only {} lines", now.len());
    let mut text = fs::read_to_string(&path).unwrap_or_else(|_| HEADER.to_owned());
    let (broken, added) = compare(&parse(&text), &now);
    assert!(
        broken.is_empty(),
        "callers rely on what was removed or changed:\n  {}\nInside v1 only additions are allowed: put it back, and \
         add the new thing beside it under a new name and number.",
        broken.join("\n  ")
    );
    if added.is_empty() {
        return;
    }
    assert!(
        std::env::var_os("RUNNER_UPDATE_BASELINE").is_some_and(|value| value == "1"),
        "the baseline does not know these yet:\n  {}\nTo promise them to callers for ever, run \
         `RUNNER_UPDATE_BASELINE=1 cargo test -p runner-proto` and commit proto/baseline.v1.txt.",
        added.join("\n  ")
    );
    for line in added {
        text.push_str(&line);
        text.push('\n');
    }
    fs::write(&path, text).expect("write the baseline");
}

/// A check that cannot fail is none: each kind of breaking change is seen as one.
#[test]
fn every_kind_of_breaking_change_is_noticed() {
    let set = FileDescriptorSet::decode(runner_proto::FILE_DESCRIPTOR_SET).expect("the descriptors decode");
    let baseline = describe(&set);
    let changed = |change: &dyn Fn(&mut prost_types::FileDescriptorProto)| {
        let mut set = set.clone();
        set.file.iter_mut().filter(|file| file.name() == "runner/v1/types.proto").for_each(change);
        compare(&baseline, &describe(&set)).0
    };
    let spec = |file: &mut prost_types::FileDescriptorProto| -> usize {
        file.message_type.iter().position(|message| message.name() == "RunSpec").expect("RunSpec")
    };
    assert!(changed(&|_| {}).is_empty());
    let removed = changed(&|file| {
        let spec = spec(file);
        file.message_type[spec].field.remove(0);
    });
    assert_eq!(removed, ["field runner.v1.RunSpec.image = 1 singular string"]);
    let renumbered = changed(&|file| {
        let spec = spec(file);
        file.message_type[spec].field[0].number = Some(99);
    });
    assert_eq!(renumbered.len(), 1);
    let retyped = changed(&|file| {
        let spec = spec(file);
        file.message_type[spec].field[0].set_type(Type::Bytes);
    });
    assert_eq!(retyped.len(), 1);
    let relabelled = changed(&|file| {
        let spec = spec(file);
        file.message_type[spec].field[0].set_label(Label::Repeated);
    });
    assert_eq!(relabelled.len(), 1);
    let value_gone = changed(&|file| {
        file.enum_type[0].value.pop();
    });
    assert_eq!(value_gone.len(), 1);
    let message_gone = changed(&|file| {
        let spec = spec(file);
        file.message_type.remove(spec);
    });
    assert!(message_gone.len() > 20);
}
