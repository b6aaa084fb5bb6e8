//! `kill`

use crate::args::Kill;
use crate::{Context, Error};

pub(crate) fn run(context: &Context, args: &Kill) -> Result<i32, Error> {
    let signal = pinion_sys::signal::parse(&args.signal)
        .ok_or_else(|| Error::Usage(format!("unknown signal {:?}", args.signal)))?;
    pinion_container::kill::kill(&context.root, &args.id, signal, args.all)?;
    Ok(0)
}
