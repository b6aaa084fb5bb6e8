//! `start`

use super::create::warn_all;
use crate::{Context, Error};

pub(crate) fn run(context: &Context, id: &str) -> Result<i32, Error> {
    warn_all(context, &pinion_container::start::start(&context.root, id)?);
    Ok(0)
}
