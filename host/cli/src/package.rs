//! `portcullis package`: an OCI image of a module, for a registry that Istio or Envoy Gateway pull from.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use portcullis_harness::{AbiVersion, Guest};
use serde_json::json;

use crate::failure::Failure;
use crate::image::{Image, Variant, tar};
use crate::print;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The module.
    #[arg(value_name = "WASM")]
    module: PathBuf,
    /// Where the image goes: a folder for an OCI image layout, or a `.tar` file that holds one.
    #[arg(short, long, value_name = "DIR|TAR")]
    output: PathBuf,
    /// How the image holds the module.
    #[arg(long, value_enum, default_value_t)]
    variant: Variant,
    /// The image's name inside the layout, by which tools find it.
    #[arg(long, value_name = "TAG", default_value = "latest")]
    tag: String,
    /// The root ids that the module knows; only for people and tools that look at the image.
    #[arg(long, value_name = "ID")]
    root_id: Vec<String>,
    /// An annotation of the image's manifest, e.g. `org.opencontainers.image.version=1.2.0`.
    #[arg(long, value_name = "KEY=VALUE", value_parser = annotation)]
    annotation: Vec<(String, String)>,
}

fn annotation(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    if key.is_empty() {
        return Err("the key is empty".to_owned());
    }
    Ok((key.to_owned(), value.to_owned()))
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let module = &arguments.module;
    // Whoever pulls the image would find out much later that it holds no filter.
    let guest = Guest::load(module).map_err(|error| Failure::Configuration(error.to_string()))?;
    let wasm = std::fs::read(module)
        .map_err(|error| Failure::Configuration(format!("{}: cannot be read: {error}", module.display())))?;
    let abi = match guest.module().abi() {
        AbiVersion::V0_1_0 => "0.1.0",
        AbiVersion::V0_2_0 => "0.2.0",
        AbiVersion::V0_2_1 => "0.2.1",
    };
    let runtime = json!({
        "type": "envoy_proxy", "abiVersions": [abi], "config": { "rootIds": arguments.root_id },
    });
    let mut annotations: BTreeMap<String, String> = arguments.annotation.iter().cloned().collect();
    annotations.entry("org.opencontainers.image.title".to_owned()).or_insert_with(|| guest.name().to_owned());
    let cannot = |error: io::Error| {
        let output = arguments.output.display();
        Failure::Running(format!("cannot write `{output}`: {error}\n  hint: its folder must exist and be writable"))
    };
    let image = Image::new(&wasm, arguments.variant, &runtime, &annotations).map_err(cannot)?;
    let files = image.layout(&arguments.tag);
    if arguments.output.extension().is_some_and(|extension| extension == "tar") {
        let named: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        std::fs::write(&arguments.output, tar(&named).map_err(cannot)?).map_err(cannot)?;
    } else {
        write_folder(&arguments.output, &files).map_err(cannot)?;
    }
    print(&format!("{}\n", image.manifest.digest))
}

/// A layout may be written over; anything else is somebody's.
fn write_folder(folder: &Path, files: &[(String, Vec<u8>)]) -> io::Result<()> {
    match std::fs::read_dir(folder) {
        Ok(mut entries) => {
            if entries.next().is_some() && !folder.join("oci-layout").is_file() {
                return Err(io::Error::other("the folder is not empty, and no OCI image layout"));
            }
            if folder.join("blobs").exists() {
                std::fs::remove_dir_all(folder.join("blobs"))?;
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    for (name, bytes) in files {
        let path = folder.join(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(path, bytes)?;
    }
    Ok(())
}
