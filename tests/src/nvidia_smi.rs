//! What `nvidia-smi` tells, for comparisons.
//!
//! In: its CSV and its process monitor. Out: texts and numbers by device and process. Invariant: what
//! it does not tell (`[N/A]`, `-`) is absent; what is not understood is an error.

use std::collections::{BTreeMap, HashMap};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// How it is found: what is added to its environment.
#[derive(Debug, Clone)]
pub struct NvidiaSmi(pub Vec<(String, String)>);

/// A device and a process on it, by the number of the device.
pub type OfProcess<T> = HashMap<(u32, u32), T>;

impl NvidiaSmi {
    fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new("nvidia-smi")
            .args(arguments)
            .envs(self.0.iter().cloned())
            .output()
            .context("nvidia-smi can't be started; it comes with the driver's programs")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!("nvidia-smi {arguments:?} fails: {}", text.trim());
        }
        Ok(text)
    }

    fn rows(&self, what: &str, fields: &[&str]) -> Result<Vec<Vec<String>>> {
        let query = format!("--query-{what}={}", fields.join(","));
        let text = self.run(&[&query, "--format=csv,noheader,nounits"])?;
        let mut rows = Vec::new();
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            let row: Vec<String> = line.split(',').map(|it| it.trim().to_owned()).collect();
            ensure!(row.len() == fields.len(), "{query} answers {line:?}");
            rows.push(row);
        }
        Ok(rows)
    }

    /// These fields of every device, by UUID; in the order of their numbers.
    pub fn devices(&self, fields: &[&str]) -> Result<Vec<(String, BTreeMap<String, String>)>> {
        let all: Vec<&str> = std::iter::once("uuid")
            .chain(fields.iter().copied())
            .collect();
        let rows = self.rows("gpu", &all)?.into_iter().map(|row| {
            let mut values = row.into_iter();
            let id = values.next().unwrap_or_default();
            let names = fields.iter().map(|name| (*name).to_owned());
            (id, names.zip(values).collect())
        });
        Ok(rows.collect())
    }

    /// Whether it knows a field; programs of older drivers lack some.
    pub fn knows(&self, field: &str) -> bool {
        self.devices(&[field]).is_ok()
    }

    /// MiB that each process has taken, by device and process.
    pub fn memory(&self) -> Result<OfProcess<f64>> {
        let devices = self.devices(&["index"])?;
        let numbers: HashMap<&str, u32> = devices
            .iter()
            .map(|(id, fields)| Ok((id.as_str(), fields["index"].parse()?)))
            .collect::<Result<_>>()?;
        let mut all = HashMap::new();
        for row in self.rows("compute-apps", &["gpu_uuid", "pid", "used_memory"])? {
            // Of parts of a device, and of processes that it may not see, it tells no amount.
            if let (Some(device), Some(mib)) = (numbers.get(row[0].as_str()), value(&row[2])?) {
                all.insert((*device, row[1].parse()?), mib);
            }
        }
        Ok(all)
    }

    /// Percent of the multiprocessors that each process is busy on; `None` where that is not told.
    pub fn busy(&self) -> Result<OfProcess<Option<f64>>> {
        busy_in(&self.run(&["pmon", "-c", "1", "-s", "um"])?)
    }
}

/// A number, or nothing where there is none to tell.
pub fn value(text: &str) -> Result<Option<f64>> {
    if text == "-" || text.starts_with('[') || text == "N/A" {
        return Ok(None);
    }
    let number = text.parse().with_context(|| format!("{text:?}"))?;
    Ok(Some(number))
}

/// Its columns differ from driver to driver; the first line names them.
fn busy_in(text: &str) -> Result<OfProcess<Option<f64>>> {
    let head = text.lines().find_map(|line| line.strip_prefix('#'));
    let head = head.with_context(|| format!("nvidia-smi pmon answers {text:?}"))?;
    let column = |name: &str| {
        let place = head.split_whitespace().position(|word| word == name);
        place.with_context(|| format!("nvidia-smi pmon has no column {name}: {head}"))
    };
    let (device, pid, sm) = (column("gpu")?, column("pid")?, column("sm")?);
    let mut all = HashMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let word = |place: usize| words.get(place).copied().unwrap_or("-");
        if let Ok(pid) = word(pid).parse() {
            let percent = value(word(sm))?;
            // A process that computes and draws has two lines.
            let known = all.entry((word(device).parse()?, pid)).or_insert(percent);
            *known = match (*known, percent) {
                (Some(one), Some(other)) => Some(f64::max(one, other)),
                (one, other) => one.or(other),
            };
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_the_monitor_are_found_by_name() {
        let newer = "# gpu         pid   type     sm    mem    enc    dec    jpg    ofa     fb   ccpm    command \n\
                     # Idx           #    C/G      %      %      %      %      %      %     MB     MB    name \n\
                     \x20   0       4711     C     97      4      -      -      -      -    512      0    python3\n\
                     \x20   1          -     -      -      -      -      -      -      -      -      -    -\n";
        let older = "# gpu        pid  type    sm   mem   enc   dec    fb   command\n# Idx          #   C/G     %     %     %     %    MB   name\n\
                     \x20   2       4712     C     -     -     -     -   128   two words\n    2       4712     G     3     -     -     -   128   two words\n";
        let found = busy_in(newer).unwrap();
        assert_eq!(found, HashMap::from([((0, 4711), Some(97.0))]));
        let found = busy_in(older).unwrap();
        assert_eq!(found, HashMap::from([((2, 4712), Some(3.0))]));
        assert!(busy_in("No devices were found\n").is_err());
        assert!(value("[Unknown Error]").unwrap().is_none() && value("x").is_err());
    }
}
