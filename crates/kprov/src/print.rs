//! Results on stdout: for people, or one JSON or YAML document.

use std::io::Write as _;

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::cli::Output;

/// Prints a result: `human` is called only when it's for people.
pub(crate) fn result<T: Serialize>(output: Output, value: &T, human: impl FnOnce(&T) -> String) -> Result<()> {
    let text = match output {
        Output::Human => human(value),
        Output::Json => serde_json::to_string_pretty(value)? + "\n",
        Output::Yaml => serde_saphyr::to_string(value).context("can't write YAML")?,
    };
    raw(&text)
}

/// Prints text as it is. A reader that went away (`| head`) is no error.
pub(crate) fn raw(text: &str) -> Result<()> {
    match anstream::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("can't write to stdout"),
    }
}

/// A table without borders, as kubectl prints them.
pub(crate) fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = comfy_table::Table::new();
    table
        .load_style(comfy_table::presets::NOTHING)
        .set_header(header.iter().map(|h| h.to_uppercase()));
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text: String = table.lines().map(|l| l.trim_end().to_owned() + "\n").collect();
    if text.is_empty() {
        text.push('\n');
    }
    text
}
