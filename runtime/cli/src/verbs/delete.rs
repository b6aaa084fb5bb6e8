//! `delete`

use super::create::warn_all;
use crate::args::Delete;
use crate::{Context, Error};

pub(crate) fn run(context: &Context, args: &Delete) -> Result<i32, Error> {
    warn_all(context, &pinion_container::delete::delete(&context.root, &args.id, args.force)?);
    Ok(0)
}
