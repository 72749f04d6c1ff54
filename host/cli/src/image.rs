//! OCI images of a module: what registries keep, and what Istio and Envoy Gateway load. Pure: bytes in, blobs out.
//!
//! The same module gives the same digests, on every machine and every day: no time, no user and no path goes in. The layout
//! follows the OCI image specification 1.1, the variants the Wasm image specification that Istio and Envoy Gateway
//! implement.

use std::collections::BTreeMap;
use std::io::{self, Write as _};

use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// How an image holds its module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Variant {
    /// An OCI image with one layer, in which the module is `plugin.wasm`. Every registry takes it.
    #[default]
    Compat,
    /// An artifact whose layer is the module itself. Not every registry takes it.
    Artifact,
}

/// An image: its blobs by digest, and which of them is the manifest.
pub(crate) struct Image {
    pub(crate) manifest: Descriptor,
    pub(crate) blobs: BTreeMap<String, Vec<u8>>,
}

/// A blob's media type, digest and size.
#[derive(Clone)]
pub(crate) struct Descriptor {
    media_type: &'static str,
    pub(crate) digest: String,
    size: usize,
}

impl Descriptor {
    fn json(&self) -> Value {
        json!({ "mediaType": self.media_type, "digest": self.digest, "size": self.size })
    }
}

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const OCI_EMPTY: &str = "application/vnd.oci.empty.v1+json";
const WASM_CONFIG: &str = "application/vnd.module.wasm.config.v1+json";
const WASM_CONTENT: &str = "application/vnd.module.wasm.content.layer.v1+wasm";

impl Image {
    /// The image of a module.
    pub(crate) fn new(
        wasm: &[u8],
        variant: Variant,
        runtime: &Value,
        annotations: &BTreeMap<String, String>,
    ) -> io::Result<Image> {
        let mut blobs = BTreeMap::new();
        let mut put = |media_type: &'static str, bytes: Vec<u8>| {
            let descriptor = Descriptor { media_type, digest: digest(&bytes), size: bytes.len() };
            blobs.insert(descriptor.digest.clone(), bytes);
            descriptor
        };
        let runtime = text(runtime);
        let mut annotations = annotations.clone();
        let manifest = match variant {
            Variant::Artifact => {
                let config = put(OCI_EMPTY, b"{}".to_vec());
                let mut layers = [put(WASM_CONFIG, runtime).json(), put(WASM_CONTENT, wasm.to_vec()).json()];
                for (layer, title) in layers.iter_mut().zip(["runtime-config.json", "plugin.wasm"]) {
                    layer["annotations"] = json!({ "org.opencontainers.image.title": title });
                }
                json!({
                    "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": WASM_CONFIG,
                    "config": config.json(), "layers": layers, "annotations": annotations,
                })
            }
            Variant::Compat => {
                let tar = tar(&[("plugin.wasm", wasm), ("runtime-config.json", &runtime)])?;
                let diff_id = digest(&tar);
                let layer = put(OCI_LAYER, gzip(&tar)?);
                let config = put(
                    OCI_CONFIG,
                    text(&json!({
                        "architecture": "wasm", "os": "wasip1",
                        "config": {},
                        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
                        "history": [{ "created_by": "portcullis package" }],
                    })),
                );
                annotations.insert("module.wasm.image/variant".to_owned(), "compat".to_owned());
                json!({
                    "schemaVersion": 2, "mediaType": OCI_MANIFEST,
                    "config": config.json(), "layers": [layer.json()], "annotations": annotations,
                })
            }
        };
        let manifest = put(OCI_MANIFEST, text(&manifest));
        Ok(Image { manifest, blobs })
    }

    /// The files of an OCI image layout that holds this image under `tag`.
    pub(crate) fn layout(&self, tag: &str) -> Vec<(String, Vec<u8>)> {
        let mut manifest = self.manifest.json();
        manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        let index = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [manifest],
        });
        let mut files = vec![
            ("oci-layout".to_owned(), text(&json!({ "imageLayoutVersion": "1.0.0" }))),
            ("index.json".to_owned(), text(&index)),
        ];
        let blobs = self.blobs.iter();
        files.extend(blobs.map(|(digest, bytes)| (format!("blobs/{}", digest.replace(':', "/")), bytes.clone())));
        files
    }
}

/// Compact JSON whose keys are in order, whatever `serde_json` was built with.
fn text(value: &Value) -> Vec<u8> {
    fn sorted(value: &Value) -> Value {
        match value {
            Value::Object(map) => {
                let map: BTreeMap<&String, Value> = map.iter().map(|(key, value)| (key, sorted(value))).collect();
                json!(map)
            }
            Value::Array(items) => items.iter().map(sorted).collect(),
            other => other.clone(),
        }
    }
    sorted(value).to_string().into_bytes()
}

fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// A tar archive in which nothing tells where and when it was made.
pub(crate) fn tar(files: &[(&str, &[u8])]) -> io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_entry_type(tar::EntryType::Regular);
        archive.append_data(&mut header, name, *bytes)?;
    }
    archive.into_inner()
}

fn gzip(bytes: &[u8]) -> io::Result<Vec<u8>> {
    // 255: no operating system is named.
    let mut encoder = GzBuilder::new().mtime(0).operating_system(255).write(Vec::new(), Compression::best());
    encoder.write_all(bytes)?;
    encoder.finish()
}
