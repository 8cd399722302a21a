//! Which kernel modules go into the initrd, and in which order: what `modprobe` would load for each
//! wish, from the files that depmod(8) writes. Pure.

use std::collections::{BTreeMap, BTreeSet};

/// depmod's files of one kernel.
#[derive(Debug, Default)]
pub(crate) struct Index {
    /// Name → path of the file and of those that it needs.
    modules: BTreeMap<String, Module>,
    /// Alias → names, for the aliases without wildcards.
    aliases: BTreeMap<String, Vec<String>>,
    /// Name → names or aliases that are loaded before it if they are there.
    soft: BTreeMap<String, Vec<String>>,
    built_in: BTreeSet<String>,
}

#[derive(Debug)]
struct Module {
    path: String,
    needs: Vec<String>,
}

/// The texts of `modules.dep`, `modules.alias`, `modules.softdep` and `modules.builtin`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Texts<'a> {
    pub(crate) dep: &'a str,
    pub(crate) alias: &'a str,
    pub(crate) softdep: &'a str,
    pub(crate) builtin: &'a str,
}

/// A module that the kernel has not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ModulesError {
    #[error("the kernel has no module {0}, neither as a file nor built in")]
    Unknown(String),
    #[error("module {0} needs {1}, which the kernel has not")]
    Needs(String, String),
    #[error("the profile's modules are more than {MAX_MODULES} with what they need")]
    TooMany,
}

impl Index {
    pub(crate) fn parse(texts: Texts<'_>) -> Self {
        let mut index = Self::default();
        for line in texts.dep.lines() {
            let Some((path, needs)) = line.split_once(':') else { continue };
            let needs = needs.split_ascii_whitespace().map(name_of).collect();
            index.modules.insert(name_of(path), Module { path: path.to_owned(), needs });
        }
        for line in texts.alias.lines() {
            let mut words = line.split_ascii_whitespace();
            if let (Some("alias"), Some(alias), Some(module), None) =
                (words.next(), words.next(), words.next(), words.next())
                && !alias.contains(['*', '?', '['])
            {
                index.aliases.entry(alias.replace('-', "_")).or_default().push(name_of(module));
            }
        }
        for line in texts.softdep.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some("softdep"), Some(module)) = (words.next(), words.next()) else { continue };
            let before = words.skip_while(|w| *w != "pre:").skip(1).take_while(|w| *w != "post:");
            index.soft.entry(name_of(module)).or_default().extend(before.map(|w| w.replace('-', "_")));
        }
        index.built_in = texts.builtin.lines().map(name_of).collect();
        index
    }

    /// Paths of the modules, each behind those that it needs. What is built in is left out.
    pub(crate) fn order(&self, wishes: &[String]) -> Result<Vec<&str>, ModulesError> {
        let mut order = Order { index: self, seen: BTreeSet::new(), paths: Vec::new() };
        for wish in wishes {
            let name = name_of(wish);
            if self.modules.contains_key(&name) {
                order.visit(&name)?;
            } else if !self.built_in.contains(&name) {
                return Err(ModulesError::Unknown(wish.clone()));
            }
        }
        if order.paths.len() > MAX_MODULES {
            return Err(ModulesError::TooMany);
        }
        Ok(order.paths)
    }
}

struct Order<'a> {
    index: &'a Index,
    seen: BTreeSet<String>,
    paths: Vec<&'a str>,
}

impl Order<'_> {
    fn visit(&mut self, name: &str) -> Result<(), ModulesError> {
        if !self.seen.insert(name.to_owned()) {
            return Ok(());
        }
        let module = self.index.modules.get(name).ok_or_else(|| ModulesError::Unknown(name.to_owned()))?;
        for soft in self.index.soft.get(name).into_iter().flatten() {
            if self.index.modules.contains_key(soft) {
                self.visit(soft)?;
            }
            for target in self.index.aliases.get(soft).into_iter().flatten() {
                if self.index.modules.contains_key(target) {
                    self.visit(target)?;
                }
            }
        }
        // modules.dep lists what must be loaded first last.
        for need in module.needs.iter().rev() {
            if !self.index.modules.contains_key(need) {
                return Err(ModulesError::Needs(name.to_owned(), need.clone()));
            }
            self.visit(need)?;
        }
        self.paths.push(&module.path);
        Ok(())
    }
}

/// A module's name as the kernel has it: without directory and suffix, `-` as `_`.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    let stem = file.split_once(".ko").map_or(file, |(stem, _)| stem);
    stem.replace('-', "_")
}

/// Most modules: their numbers in the initrd have two digits, and the guest takes no more.
pub(crate) const MAX_MODULES: usize = 99;

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "\
kernel/drivers/block/virtio_blk.ko.xz:
kernel/drivers/md/dm-mod.ko.xz:
kernel/drivers/md/dm-bufio.ko.xz: kernel/drivers/md/dm-mod.ko.xz
kernel/lib/reed_solomon.ko.xz:
kernel/drivers/md/dm-verity.ko.xz: kernel/drivers/md/dm-bufio.ko.xz kernel/drivers/md/dm-mod.ko.xz kernel/lib/reed_solomon.ko.xz
kernel/crypto/crc32c_generic.ko.xz:
kernel/arch/x86/crypto/crc32c-intel.ko.xz:
kernel/lib/libcrc32c.ko.xz:
kernel/fs/erofs/erofs.ko.xz: kernel/lib/libcrc32c.ko.xz
kernel/broken.ko.xz: kernel/absent.ko.xz
";

    fn index() -> Index {
        Index::parse(Texts {
            dep: DEP,
            alias: "# comment\nalias crc32c crc32c_intel\nalias crc32c crc32c_generic\nalias pci:v* virtio_blk\n",
            softdep: "softdep libcrc32c pre: crc32c post: erofs\n",
            builtin: "kernel/drivers/virtio/virtio-pci.ko\n",
        })
    }

    fn order(wishes: &[&str]) -> Result<Vec<String>, ModulesError> {
        let wishes: Vec<String> = wishes.iter().map(|w| (*w).to_owned()).collect();
        Ok(index().order(&wishes)?.into_iter().map(name_of).collect())
    }

    #[test]
    fn needs_come_first_and_once() {
        let expected = ["virtio_blk", "reed_solomon", "dm_mod", "dm_bufio", "dm_verity"];
        assert_eq!(order(&["virtio_blk", "dm-verity", "dm_bufio"]).unwrap(), expected);
    }

    #[test]
    fn soft_needs_are_found_by_alias() {
        assert_eq!(order(&["erofs"]).unwrap(), ["crc32c_intel", "crc32c_generic", "libcrc32c", "erofs"]);
    }

    #[test]
    fn built_in_module_is_left_out() {
        assert_eq!(order(&["virtio_pci", "dm-mod"]).unwrap(), ["dm_mod"]);
    }

    #[test]
    fn unknown_module_is_named() {
        assert_eq!(order(&["virtio_blk", "nope"]), Err(ModulesError::Unknown("nope".into())));
        assert_eq!(order(&["broken"]), Err(ModulesError::Needs("broken".into(), "absent".into())));
    }

    #[test]
    fn as_many_modules_as_the_guest_takes_and_no_more() {
        let dep = |n: usize| (0..n).map(|i| format!("k/m{i}.ko.xz:\n")).collect::<String>();
        let wishes = |n: usize| (0..n).map(|i| format!("m{i}")).collect::<Vec<_>>();
        let dep = dep(MAX_MODULES + 1);
        let index = Index::parse(Texts { dep: &dep, alias: "", softdep: "", builtin: "" });
        assert_eq!(index.order(&wishes(MAX_MODULES)).unwrap().len(), MAX_MODULES);
        assert_eq!(index.order(&wishes(MAX_MODULES + 1)), Err(ModulesError::TooMany));
    }
}
