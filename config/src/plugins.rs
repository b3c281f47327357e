//! Which plugins an entry of `allow-compute-plugins` or `block-compute-plugins` means.
//!
//! In: entries as the original takes them, the path of a plugin's module or of a package above it.
//! Out: whether an entry means a plugin of this agent.

/// The package of the original's plugins.
const PACKAGE: &str = "ai.backend.accelerator";

/// Whether an entry means a plugin, which is named by its devices (`cuda`): `ai.backend.accelerator.cuda_open`
/// and `cuda_open` mean that of `cuda`; `ai.backend.accelerator`, and what is above it, mean all.
pub fn means_plugin(entry: &str, plugin: &str) -> bool {
    let is_above = PACKAGE.strip_prefix(entry);
    if is_above.is_some_and(|rest| rest.is_empty() || rest.starts_with('.')) {
        return true;
    }
    let below = entry
        .strip_prefix(PACKAGE)
        .and_then(|it| it.strip_prefix('.'));
    let module = match below {
        // The module of the package may be named too.
        Some(path) => path.strip_suffix(".plugin").unwrap_or(path),
        None => entry.rsplit('.').next().unwrap_or(entry),
    };
    // Names of slots, which device plugins go by, may have either.
    let is_same = module == plugin || module.replace('_', "-") == plugin;
    !module.contains('.') && (is_same || module.split('_').next() == Some(plugin))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_means_a_plugin_or_all_below_a_package() {
        let means = |entry: &str| {
            ["cuda", "rocm", "mock", "my_npu", "atom-plus"]
                .into_iter()
                .filter(|plugin| means_plugin(entry, plugin))
                .collect::<Vec<_>>()
                .join(" ")
        };
        for (entry, plugins) in [
            ("ai.backend.accelerator.cuda_open", "cuda"),
            ("ai.backend.accelerator.cuda_open.plugin", "cuda"),
            ("ai.backend.accelerator.rocm", "rocm"),
            ("mock", "mock"),
            ("cuda_open", "cuda"),
            ("my_npu", "my_npu"),
            ("ai.backend.accelerator.atom_plus", "atom-plus"),
            ("ai.backend.accelerator", "cuda rocm mock my_npu atom-plus"),
            ("ai.backend", "cuda rocm mock my_npu atom-plus"),
            ("ai", "cuda rocm mock my_npu atom-plus"),
            // A part of a name is no package.
            ("ai.back", ""),
            ("a", ""),
            ("", ""),
            ("ai.backend.accelerator.", ""),
            ("ai.backend.accelerators", ""),
            ("ai.backend.accelerator.cuda_open.plugin.more", ""),
            ("ai.backend.accelerator.ipu", ""),
        ] {
            assert_eq!(means(entry), plugins, "{entry}");
        }
    }
}
