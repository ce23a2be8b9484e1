//! `tsquant inspect`: everything it prints of the shipped network and of small models, as snapshots.

mod binary;

use std::path::Path;

use serde_json::Value;

use binary::{Folder, shipped, test_data, test_model, tsquant};

/// What `inspect MODEL` with `flags` prints.
fn inspect(model: &Path, flags: &[&str]) -> String {
    let folder = Folder::new();
    let model = model.to_str().expect("a path in UTF-8");
    let ran = tsquant(folder.path(), ["inspect", model].iter().chain(flags)).succeeded();
    assert_eq!((ran.stderr.as_str(), folder.listing().len()), ("", 0));
    ran.stdout
}

/// The same in JSON, without the folder that the repository lies in.
fn inspect_json(model: &Path, flags: &[&str]) -> String {
    let text = inspect(model, &[&["--json"], flags].concat());
    let report: Value = serde_json::from_str(&text).expect("JSON");
    let shown = model.to_str().expect("a path in UTF-8");
    assert_eq!(report["model"], Value::from(shown));
    text.replace(shown, &shown.replace(shipped("").to_str().expect("a path in UTF-8"), "/repository/"))
}

fn data_flags(data: &Path, inputs: &str) -> [String; 4] {
    let data = data.to_str().expect("a path in UTF-8").to_owned();
    ["--data".to_owned(), data, "--inputs".to_owned(), inputs.to_owned()]
}

/// Snapshots of text and JSON of a test model, unchecked or checked on its data.
fn snapshot(name: &str, inputs: Option<&str>) {
    let model = test_model(name);
    let flags = inputs.map(|inputs| data_flags(&test_data(name), inputs));
    let flags: Vec<&str> = flags.iter().flatten().map(String::as_str).collect();
    let title = if inputs.is_some() { "checked" } else { "unchecked" };
    insta::assert_snapshot!(format!("{name}_{title}"), inspect(&model, &flags));
    insta::assert_snapshot!(format!("{name}_{title}_json"), inspect_json(&model, &flags));
}

#[test]
fn the_shipped_network() {
    let model = shipped("models/mnist_resnet.pt");
    let flags = data_flags(&shipped("models/mnist_calibration.safetensors"), "images");
    let flags = flags.each_ref().map(String::as_str);
    insta::assert_snapshot!("mnist_resnet_checked", inspect(&model, &flags));
    insta::assert_snapshot!("mnist_resnet_checked_json", inspect_json(&model, &flags));
}

#[test]
fn an_encoder_of_token_ids() {
    snapshot("tiny_encoder", None);
    snapshot("tiny_encoder", Some("ids,mask"));
}

#[test]
fn recurrent_layers() {
    snapshot("recurrent", None);
    snapshot("recurrent", Some("x"));
}

#[test]
fn branches_and_loops() {
    snapshot("control_flow", None);
    snapshot("control_flow", Some("x"));
}

#[test]
fn several_arguments_and_outputs() {
    snapshot("multi_io", None);
    snapshot("multi_io", Some("x=x,y=y"));
}

#[test]
fn a_frozen_file() {
    snapshot("frozen_cnn", None);
    snapshot("frozen_cnn", Some("x"));
}

#[test]
fn names_reach_inputs_in_any_order() {
    let model = test_model("tiny_encoder");
    let data = test_data("tiny_encoder");
    let given = |inputs: &str| {
        let flags = data_flags(&data, inputs);
        inspect(&model, &flags.each_ref().map(String::as_str))
    };
    assert_eq!(given("mask=mask,ids=ids"), given("ids,mask"));
}

#[test]
fn constants_and_a_transform_are_written_as_for_evaluate() {
    for inputs in ["x,const:null,const:0.5", "x=x,scale=const:2.0,shift=const:-1"] {
        let flags = data_flags(&test_data("multi_io"), inputs);
        let flags = [&flags.each_ref().map(String::as_str)[..], &["--transform", "{scale: 0.5}"]].concat();
        let text = inspect(&test_model("multi_io"), &flags);
        assert!(text.contains("clean-up: checked on the data given"), "{text}");
    }
}

#[test]
fn dtypes_that_nothing_tells_are_marked_without_data() {
    // Both masks are only cast or compared before anything computes with them.
    for (name, argument) in [("tiny_encoder", "mask"), ("sdpa", "mask")] {
        let text = inspect(&test_model(name), &[]);
        assert!(text.contains(&format!("{argument}: Tensor (dtype unknown without data)")), "{name}: {text}");
    }
    // Token ids are indices, images go into a convolution.
    for (name, argument) in [("tiny_encoder", "ids"), ("frozen_cnn", "x")] {
        let text = inspect(&test_model(name), &[]);
        assert!(!text.contains(&format!("{argument}: Tensor (dtype")), "{name}: {text}");
    }
    let report = inspect_json(&test_model("tiny_encoder"), &[]);
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(report["arguments"][1]["unknown_dtype"], Value::from(true), "{}", report["arguments"]);
}

#[test]
fn the_graph_is_printed_on_request() {
    let text = inspect(&test_model("frozen_cnn"), &["--graph"]);
    assert!(text.starts_with(&inspect(&test_model("frozen_cnn"), &[])), "{text}");
    assert!(text.contains("\ngraph(") && text.contains("aten::conv2d("), "{text}");
}

#[test]
fn nothing_of_a_scripted_encoder_is_lost() {
    // Its slow path, which is kept, computes with the same layers as the fused one.
    for flags in [None, Some(data_flags(&test_data("scripted_encoder"), "x"))] {
        let flags: Vec<&str> = flags.iter().flatten().map(String::as_str).collect();
        let text = inspect(&test_model("scripted_encoder"), &flags);
        for site in
            ["encoder.linear1.weight", "encoder.linear2.weight", "encoder.self_attn.out_proj.weight", "fc.weight"]
        {
            assert!(text.contains(site), "{site} is not in {text}");
        }
        assert!(!text.contains("Uninitialized"), "{text}");
    }
}
