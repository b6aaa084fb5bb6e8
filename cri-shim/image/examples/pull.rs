//! Pulls one image into a directory and says how long that took: `pull ROOT REFERENCE`.

use std::{error::Error, path::PathBuf, sync::Arc, time::Instant};

use pinion_image::{ImageConfig, Images};
use pinion_store::Store;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(root), Some(reference)) = (arguments.next(), arguments.next()) else {
        return Err("usage: pull ROOT REFERENCE".into());
    };
    let root = PathBuf::from(root);
    let store = Store::open(root.join("store.redb"))?.store;
    let images = Images::open(ImageConfig { root, ..ImageConfig::default() }, store)?;
    let started = Instant::now();
    let image = images.pull(&reference, &None, Arc::new(|_| {})).await?;
    println!("{} in {:.3} s", image.id, started.elapsed().as_secs_f64());
    Ok(())
}
