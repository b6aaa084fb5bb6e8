//! `start`

use crate::{Context, Error};

pub(crate) fn run(context: &Context, id: &str) -> Result<i32, Error> {
    pinion_container::start::start(&context.root, id)?;
    Ok(0)
}
