//! Manifests, indexes and configurations, well formed and hostile.

use super::*;
use crate::ErrorKind;

fn descriptor(media_type: &str) -> String {
    let digest = Digest::of(media_type.as_bytes());
    format!(r#"{{"mediaType":"{media_type}","digest":"{digest}","size":3}}"#)
}

fn manifest(config: &str, layers: &[&str]) -> String {
    let layers: Vec<_> = layers.iter().map(|l| descriptor(l)).collect();
    format!(
        r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","config":{},"layers":[{}]}}"#,
        descriptor(config),
        layers.join(",")
    )
}

fn parse(text: &str) -> Result<Document> {
    super::parse("x", text.as_bytes(), None)
}

fn entry(platform: Option<(&str, &str, &str)>) -> Choice {
    let platform = platform.map(|(os, architecture, variant)| Platform {
        os: os.into(),
        architecture: architecture.into(),
        variant: variant.into(),
    });
    let name = format!("{platform:?}");
    let digest = Digest::of(name.as_bytes());
    let target = Descriptor { media_type: OCI_MANIFEST.into(), digest, size: 1 };
    Choice { target, platform, names: Vec::new() }
}

#[test]
fn a_document_is_exactly_one_of_manifest_and_index() {
    let good = manifest(OCI_CONFIG, &[OCI_LAYER]);
    assert!(matches!(parse(&good).unwrap(), Document::Manifest(m) if m.layers.len() == 1));
    let both = good.replace("\"schemaVersion\":2,", "\"schemaVersion\":2,\"manifests\":[],");
    let neither = r#"{"schemaVersion":2}"#;
    let mislabelled = good.replace(OCI_MANIFEST, OCI_INDEX);
    let twice = good.replace("\"schemaVersion\":2,", "\"schemaVersion\":2,\"layers\":[],");
    let deep = format!("{{\"schemaVersion\":2,\"x\":{}", "[".repeat(100_000));
    for bad in [&both, neither, &mislabelled, &twice, &deep, "", "null", "[]"] {
        assert_eq!(parse(bad).unwrap_err().kind(), ErrorKind::DataLoss, "{bad:.80}");
    }
    let schema1 = r#"{"schemaVersion":1,"fsLayers":[],"history":[]}"#;
    assert_eq!(parse(schema1).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn the_type_it_was_sent_as_must_fit() {
    let text = manifest(OCI_CONFIG, &[]);
    let parse = |sent| super::parse("x", text.as_bytes(), Some(sent));
    assert!(parse(OCI_MANIFEST).is_ok());
    assert!(parse("application/json").is_ok(), "a type that says nothing is ignored");
    assert!(parse(OCI_INDEX).is_err());
    assert!(parse(DOCKER_MANIFEST).is_err());
}

#[test]
fn digests_in_a_manifest_are_checked_while_parsing() {
    let text = manifest(OCI_CONFIG, &[OCI_LAYER]);
    let digest = Digest::of(OCI_LAYER.as_bytes());
    for bad in ["sha256:../../x", "", "sha512:aa", "sha256:ABC"] {
        assert!(parse(&text.replace(digest.as_str(), bad)).is_err(), "{bad}");
    }
}

#[test]
fn only_images_made_of_tar_layers_are_accepted() {
    let check = |config: &str, layers: &[&str]| match parse(&manifest(config, layers)).unwrap() {
        Document::Manifest(m) => m.check("x", 2),
        Document::Index(_) => panic!("not an index"),
    };
    assert!(check(OCI_CONFIG, &["application/vnd.oci.image.layer.v1.tar+zstd"]).is_ok());
    assert!(check(DOCKER_CONFIG, &["application/vnd.docker.image.rootfs.diff.tar.gzip"]).is_ok());
    for (config, layer) in [
        ("application/vnd.cncf.helm.config.v1+json", OCI_LAYER),
        (OCI_CONFIG, "application/vnd.erofs.layer.v1"),
        (OCI_CONFIG, "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"),
    ] {
        assert_eq!(check(config, &[layer]).unwrap_err().kind(), ErrorKind::Unsupported);
    }
    let many = check(OCI_CONFIG, &[OCI_LAYER; 3]).unwrap_err();
    assert_eq!(many.kind(), ErrorKind::ResourceExhausted);
}

#[test]
fn the_plainest_variant_for_this_machine_is_chosen() {
    let host = |architecture: &str, variant: &str| Platform {
        os: "linux".into(),
        architecture: architecture.into(),
        variant: variant.into(),
    };
    let choices = [
        entry(Some(("windows", "amd64", ""))),
        entry(Some(("unknown", "unknown", ""))),
        entry(Some(("linux", "amd64", "v3"))),
        entry(Some(("linux", "amd64", ""))),
        entry(Some(("linux", "arm64", "v8"))),
    ];
    let chosen = |host: &Platform| choose("x", &choices, host).map(|c| c.platform.clone().unwrap());
    assert_eq!(chosen(&host("amd64", "")).unwrap().variant, "");
    assert_eq!(chosen(&host("arm64", "v8")).unwrap().architecture, "arm64");
    let error = chosen(&host("riscv64", "")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("linux/arm64/v8"), "{error}");
    let plain = [entry(Some(("linux", "s390x", ""))), entry(None)];
    assert!(choose("x", &plain, &host("amd64", "")).unwrap().platform.is_none());
}

#[test]
fn a_configuration_has_one_diff_id_per_layer() {
    let config = |diff_ids: &str| {
        format!(
            r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":[{diff_ids}]}}}}"#
        )
    };
    let id = format!("{:?}", Digest::of(b"x").to_string());
    assert!(parse_config("x", config(&id).as_bytes(), 1).is_ok());
    assert!(parse_config("x", config(&id).as_bytes(), 2).is_err());
    assert!(parse_config("x", config("\"sha256:../x\"").as_bytes(), 1).is_err());
    let (parsed, _) = parse_config("x", config(&id).as_bytes(), 1).unwrap();
    let other = Platform { os: "linux".into(), architecture: "s390x".into(), variant: "".into() };
    assert!(check_platform("x", &parsed, &other).is_err());
}

/// JSON of the keys and values that these documents have, put together in any way.
fn any_document() -> impl proptest::strategy::Strategy<Value = serde_json::Value> {
    use proptest::prelude::*;
    use serde_json::{Value, json};
    let digest = Digest::of(b"x").to_string();
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        prop_oneof![Just(0_u64), Just(2), Just(3), Just(u64::MAX)].prop_map(Value::from),
        Just(json!(-1)),
        Just(json!(1e300)),
        prop_oneof![
            Just(digest),
            Just("sha256:../../x".to_owned()),
            Just(OCI_MANIFEST.to_owned()),
            Just(OCI_INDEX.to_owned()),
            Just(OCI_CONFIG.to_owned()),
            Just(OCI_LAYER.to_owned()),
            ".{0,40}",
        ]
        .prop_map(Value::from),
    ];
    let key = prop_oneof![
        Just("schemaVersion"),
        Just("mediaType"),
        Just("config"),
        Just("layers"),
        Just("manifests"),
        Just("fsLayers"),
        Just("digest"),
        Just("size"),
        Just("platform"),
        Just("os"),
        Just("architecture"),
        Just("annotations"),
        Just("rootfs"),
        Just("diff_ids"),
        Just("type"),
    ];
    leaf.prop_recursive(5, 60, 8, move |inner| {
        let pairs = proptest::collection::vec((key.clone(), inner.clone()), 0..8);
        prop_oneof![
            proptest::collection::vec(inner, 0..5).prop_map(Value::from),
            pairs.prop_map(|pairs| {
                pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect::<Value>()
            }),
        ]
    })
}

proptest::proptest! {
    #[test]
    fn no_document_is_more_than_one_kind_and_none_panics(
        document in any_document(),
        version in proptest::bool::ANY,
        layers in 0_usize..4,
    ) {
        let mut document = document;
        if let (true, Some(map)) = (version, document.as_object_mut()) {
            map.insert("schemaVersion".to_owned(), 2.into());
        }
        let text = document.to_string();
        let first = parse(&text);
        if let Ok(found) = &first {
            proptest::prop_assert_eq!(found, &parse(&text).unwrap());
            let both = document.get("manifests").is_some_and(|m| !m.is_null())
                && document.get("layers").is_some_and(|l| !l.is_null());
            proptest::prop_assert!(!both, "{}", text);
        }
        if let Ok((_, diff_ids)) = parse_config("x", text.as_bytes(), layers) {
            proptest::prop_assert_eq!(diff_ids.len(), layers);
        }
    }

    #[test]
    fn a_damaged_manifest_is_refused_or_says_the_same(at in 0_usize..400, byte: u8) {
        let good = manifest(OCI_CONFIG, &[OCI_LAYER, OCI_LAYER]);
        let mut bytes = good.into_bytes();
        let at = at % bytes.len();
        bytes[at] = byte;
        if let Ok(Document::Manifest(manifest)) = super::parse("x", &bytes, None) {
            // A digest that is no digest never gets further than this.
            for descriptor in manifest.layers.iter().chain([&manifest.config]) {
                proptest::prop_assert!(Digest::parse(&descriptor.digest.to_string()).is_ok());
            }
        }
    }
}
