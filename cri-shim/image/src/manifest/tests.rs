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
