//! `list`

use pinion_container::error::chain;
use pinion_container::state::{self, Record, StateDir};

use super::print_json;
use super::state::Listed;
use crate::args::{Format, List};
use crate::{Context, Error};

pub(crate) fn run(context: &Context, args: &List) -> Result<i32, Error> {
    if context.root_is_given {
        // The default one is made with the first container; another may be a slip of the pen.
        let what = || format!("list the containers in {}", context.root.display());
        std::fs::metadata(&context.root).map_err(|source| Error::Io { what: what(), source })?;
    }
    let mut records: Vec<Record> = Vec::new();
    for (id, record) in state::list(&context.root)? {
        match record {
            Ok(record) => records.push(record),
            Err(error) => context.log.warn(&format!("load container {id}: {}", chain(&error))),
        }
    }
    if args.quiet {
        records.iter().for_each(|record| println!("{}", record.id));
        return Ok(0);
    }
    let mut rows = Vec::new();
    for record in &records {
        let status = StateDir::of(&context.root, &record.id)?.status(record);
        rows.push(Listed::new(record, status, user_name(record.owner)));
    }
    match args.format {
        Format::Json => print_json(&rows, false)?,
        Format::Table => print_table(&rows),
    }
    Ok(0)
}

fn print_table(rows: &[Listed<'_>]) {
    let mut cells = vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned)];
    cells.extend(rows.iter().map(|row| {
        [
            row.id.to_owned(),
            row.pid.to_string(),
            row.status.to_string(),
            row.bundle.display().to_string(),
            row.created.to_owned(),
            row.owner.clone(),
        ]
    }));
    let width = |column: usize| cells.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..6).map(|column| width(column).max(9) + 3).collect();
    for row in &cells {
        let padded = row.iter().zip(&widths).take(5).map(|(cell, width)| format!("{cell:width$}"));
        println!("{}{}", padded.collect::<String>(), row[5]);
    }
}

/// The name of a user, or `#` and the number.
fn user_name(uid: u32) -> String {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let found = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    });
    found.unwrap_or_else(|| format!("#{uid}"))
}
