//! `pinctl image …`.

use crate::cli::PullArgs;
use crate::connect::Node;
use crate::error::Error;
use crate::output::{self, Format};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use pinion_cri_proto::admin::{
    LoadImageRequest, PullImageRequest, PullProgress, pull_progress::Stage,
};
use pinion_cri_proto::v1::{ImageSpec, ListImagesRequest, RemoveImageRequest};
use serde::Serialize;
use std::collections::HashMap;
use std::io::Read as _;
use std::path::Path;

#[derive(Debug, Serialize)]
struct Row {
    id: String,
    tags: Vec<String>,
    digests: Vec<String>,
    size_bytes: u64,
    pinned: bool,
}

/// Lists images, one line for each name.
pub(crate) async fn list(node: &mut Node, format: Format) -> Result<(), Error> {
    let answer = node.images.list_images(ListImagesRequest::default()).await;
    let images = answer.map_err(Error::call("listing images"))?.into_inner().images;
    let rows: Vec<Row> = images
        .into_iter()
        .map(|i| Row {
            id: i.id,
            tags: i.repo_tags,
            digests: i.repo_digests,
            size_bytes: i.size,
            pinned: i.pinned,
        })
        .collect();
    if format == Format::Json {
        return output::json(&rows);
    }
    let mut lines = Vec::new();
    for row in &rows {
        let names = if row.tags.is_empty() { &row.digests } else { &row.tags };
        for name in names {
            lines.push(vec![name.clone(), output::short(&row.id), output::size(row.size_bytes)]);
        }
        if names.is_empty() {
            lines.push(vec!["-".into(), output::short(&row.id), output::size(row.size_bytes)]);
        }
    }
    lines.sort();
    output::table(&["IMAGE", "ID", "SIZE"], lines)
}

/// Removes images; one that is not there is an error here, unlike in CRI.
pub(crate) async fn remove(node: &mut Node, images: &[String]) -> Result<(), Error> {
    for image in images {
        let spec = Some(ImageSpec { image: image.clone(), ..ImageSpec::default() });
        let request =
            pinion_cri_proto::v1::ImageStatusRequest { image: spec.clone(), verbose: false };
        let answer = node.images.image_status(request).await;
        if answer.map_err(Error::call(format!("looking up {image}")))?.into_inner().image.is_none()
        {
            return Err(Error::Unknown {
                what: "image",
                given: image.clone(),
                hint: "`pinctl image ls` lists what there is",
            });
        }
        let answer = node.images.remove_image(RemoveImageRequest { image: spec }).await;
        answer.map_err(Error::call(format!("removing {image}")))?;
        output::print(image)?;
    }
    Ok(())
}

/// Loads a layout or archive of this machine.
pub(crate) async fn load(
    node: &mut Node,
    format: Format,
    path: &Path,
    name: Option<String>,
) -> Result<(), Error> {
    let failed = |source| Error::File { action: "read", path: path.to_owned(), source };
    let absolute = std::fs::canonicalize(path).map_err(failed)?;
    let request = LoadImageRequest {
        path: absolute.to_string_lossy().into_owned(),
        reference: name.unwrap_or_default(),
    };
    let answer = node.admin.load_image(request).await;
    let loaded = answer.map_err(Error::call(format!("loading {}", path.display())))?;
    let references = loaded.into_inner().references;
    match format {
        Format::Json => output::json(&references),
        Format::Table => output::print(&references.join("\n")),
    }
}

/// Pulls an image, with a bar for each layer on a terminal.
pub(crate) async fn pull(node: &mut Node, format: Format, args: PullArgs) -> Result<(), Error> {
    let password = args.password_file.as_deref().map(read_password).transpose()?;
    let request = PullImageRequest {
        reference: args.image.clone(),
        username: args.username.unwrap_or_default(),
        password: password.unwrap_or_default(),
    };
    let id = pull_with_bars(node, request, format).await?;
    match format {
        Format::Json => output::json(&serde_json::json!({ "image": args.image, "id": id })),
        Format::Table => output::print(&id),
    }
}

/// Pulls and shows progress on standard error; gives the image's id.
pub(crate) async fn pull_with_bars(
    node: &mut Node,
    request: PullImageRequest,
    format: Format,
) -> Result<String, Error> {
    let action = format!("pulling {}", request.reference);
    let answer = node.admin.pull_image(request).await;
    let mut stream = answer.map_err(Error::call(action.clone()))?.into_inner();
    let mut bars = Bars::new(format == Format::Table);
    let mut id = String::new();
    while let Some(progress) = stream.message().await.map_err(Error::call(action.clone()))? {
        if !progress.image_id.is_empty() {
            id.clone_from(&progress.image_id);
        }
        bars.show(&progress);
    }
    bars.finish();
    Ok(id)
}

fn read_password(path: &Path) -> Result<String, Error> {
    let failed = |source| Error::File { action: "read", path: path.to_owned(), source };
    let mut text = String::new();
    if path == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).map_err(failed)?;
    } else {
        text = std::fs::read_to_string(path).map_err(failed)?;
    }
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

/// A progress bar for each layer; indicatif hides them where there is no terminal.
#[derive(Debug)]
struct Bars {
    group: MultiProgress,
    layers: HashMap<String, ProgressBar>,
    visible: bool,
}

impl Bars {
    fn new(visible: bool) -> Self {
        Self { group: MultiProgress::new(), layers: HashMap::new(), visible }
    }

    fn show(&mut self, progress: &PullProgress) {
        if !self.visible || progress.layer.is_empty() {
            return;
        }
        let group = &self.group;
        let bar = self.layers.entry(progress.layer.clone()).or_insert_with(|| {
            let bar = group.add(ProgressBar::new(progress.total_bytes));
            let template = "{prefix} {msg:<12} {bar:30} {bytes:>10} / {total_bytes}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(output::short(&progress.layer));
            bar
        });
        if progress.total_bytes > 0 {
            bar.set_length(progress.total_bytes);
        }
        match progress.stage() {
            Stage::Resolving => bar.set_message("resolving"),
            Stage::Downloading => {
                bar.set_message("downloading");
                bar.set_position(progress.done_bytes);
            }
            Stage::Unpacking => {
                bar.set_message("unpacking");
                bar.set_position(progress.total_bytes);
            }
            Stage::Done => bar.finish_with_message("done"),
            Stage::AlreadyPresent => bar.finish_with_message("present"),
        }
    }

    fn finish(&self) {
        for bar in self.layers.values().filter(|b| !b.is_finished()) {
            bar.finish_with_message("done");
        }
    }
}
