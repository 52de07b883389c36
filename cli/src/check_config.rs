//! `understudy check-config`: reads a configuration as dom0d does, without dom0d.

use std::path::Path;

use serde::Serialize;
use understudy_api::config::Config;

use crate::failed::Failed;
use crate::output::Output;

#[derive(Serialize)]
struct Checked<'a> {
    path: &'a Path,
    ok: bool,
    services: Vec<&'a str>,
}

pub(crate) fn check_config(path: &Path, output: &Output) -> Result<(), Failed> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        let message = format!("can't read {}: {error}", path.display());
        Failed::refused("unreadable_config", message)
    })?;
    let config: Config = text.parse().map_err(|error| {
        let message = format!("{} is invalid:\n{error}", path.display());
        Failed::refused("invalid_config", message.trim_end())
    })?;
    let names = config.services.iter().map(|s| s.engine.name.as_str());
    let checked = Checked { path, ok: true, services: names.collect() };
    output.result(&checked, || {
        format!(
            "{} is valid: {}. dom0d looks for its domains and bridges when it runs.\n",
            path.display(),
            match checked.services.as_slice() {
                [one] => format!("service {one}"),
                services => format!("services {}", services.join(", ")),
            }
        )
    })
}
