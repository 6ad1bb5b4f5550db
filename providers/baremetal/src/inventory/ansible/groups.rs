//! Groups, hosts and variables of an Ansible inventory, and which variables a host ends up with.

use std::collections::{BTreeMap, BTreeSet};

use camino::Utf8Path;

use super::super::Files;
use super::super::error::{InventoryError, Place};
use super::super::yaml::{self, Value};

/// A variable and where it was set.
#[derive(Clone, Debug)]
pub(super) struct Var {
    pub(super) value: Value,
    pub(super) place: Place,
}

/// Variables by name.
pub(super) type Vars = BTreeMap<String, Var>;

/// A group.
#[derive(Clone, Debug, Default)]
pub(super) struct Group {
    pub(super) hosts: BTreeSet<String>,
    /// Groups in it, each with the place that says so.
    pub(super) children: BTreeMap<String, Place>,
    pub(super) vars: Vars,
    /// Whether it stands somewhere by itself, not only as another's child.
    pub(super) defined: bool,
}

/// Everything an inventory says.
#[derive(Clone, Debug, Default)]
#[expect(
    clippy::struct_field_names,
    reason = "the groups among all else that an inventory says"
)]
pub(super) struct Groups {
    pub(super) groups: BTreeMap<String, Group>,
    /// Each host's own variables.
    pub(super) host_vars: BTreeMap<String, Vars>,
    /// Hosts in the order in which they were met first, and where.
    pub(super) order: Vec<(String, Place)>,
}

/// The group that all hosts are in.
pub(super) const ALL: &str = "all";

impl Groups {
    pub(super) fn group(&mut self, name: &str) -> &mut Group {
        self.groups.entry(name.to_owned()).or_default()
    }

    /// Puts a host into a group.
    pub(super) fn add_host(&mut self, group: &str, host: &str, vars: Vars, place: &Place) {
        if !self.host_vars.contains_key(host) {
            self.order.push((host.to_owned(), place.clone()));
        }
        self.host_vars.entry(host.to_owned()).or_default().extend(vars);
        self.group(group).hosts.insert(host.to_owned());
    }

    /// Reads `group_vars` and `host_vars` beside the inventory.
    pub(super) fn read_vars(&mut self, files: &dyn Files, inventory: &Utf8Path) -> Result<(), InventoryError> {
        let beside = inventory.parent().unwrap_or(Utf8Path::new(""));
        let mut names: Vec<String> = self.groups.keys().cloned().collect();
        names.extend([ALL.to_owned(), "ungrouped".to_owned()]);
        for name in names {
            let vars = vars_of(files, &beside.join("group_vars"), &name)?;
            if !vars.is_empty() {
                self.group(&name).vars.extend(vars);
            }
        }
        for (host, vars) in &mut self.host_vars {
            vars.extend(vars_of(files, &beside.join("host_vars"), host)?);
        }
        Ok(())
    }

    /// Refuses groups that are named as children and are nowhere else, and groups that contain themselves.
    pub(super) fn check(&self) -> Result<(), InventoryError> {
        for (name, group) in &self.groups {
            for (child, place) in &group.children {
                if !self.groups.get(child).is_some_and(|group| group.defined) {
                    return Err(InventoryError::new(
                        place,
                        format!("the group `{child}`, named as a child of `{name}`, is not there"),
                    )
                    .hint(format!("give it a section `[{child}]`, or take it out")));
                }
                if self.below(child).contains(name.as_str()) {
                    return Err(InventoryError::new(place, format!("the group `{name}` is in itself")));
                }
            }
        }
        Ok(())
    }

    /// A group and all groups in it.
    fn below<'a>(&'a self, group: &'a str) -> BTreeSet<&'a str> {
        let mut found = BTreeSet::new();
        let mut waiting = vec![group];
        while let Some(next) = waiting.pop() {
            if found.insert(next)
                && let Some(group) = self.groups.get(next)
            {
                waiting.extend(group.children.keys().map(String::as_str));
            }
        }
        found
    }

    /// All groups that a host is in, directly or not.
    pub(super) fn of<'a>(&'a self, host: &str) -> BTreeSet<&'a str> {
        self.groups
            .keys()
            .map(String::as_str)
            .filter(|group| {
                self.below(group)
                    .iter()
                    .any(|g| self.groups.get(*g).is_some_and(|g| g.hosts.contains(host)))
            })
            .collect()
    }

    /// How deep a group lies: `all` is 0, and a child is deeper than each of its parents.
    fn depth(&self, group: &str) -> usize {
        if group == ALL {
            return 0;
        }
        let parents = self.groups.iter().filter(|(_, g)| g.children.contains_key(group));
        1 + parents.map(|(name, _)| self.depth(name)).max().unwrap_or(0)
    }

    /// The variables that hold for a host: `all`, then parents before children, groups of one depth by name, then its own.
    pub(super) fn vars(&self, host: &str) -> Vars {
        let mut groups: Vec<(usize, &str)> = self
            .of(host)
            .into_iter()
            .filter(|group| *group != ALL)
            .map(|group| (self.depth(group), group))
            .collect();
        groups.sort_unstable();
        let mut vars = Vars::new();
        for group in std::iter::once(ALL).chain(groups.into_iter().map(|(_, group)| group)) {
            if let Some(group) = self.groups.get(group) {
                vars.extend(group.vars.clone());
            }
        }
        vars.extend(self.host_vars.get(host).cloned().unwrap_or_default());
        vars
    }
}

/// The variables in `<directory>/<name>`, `.yml`, `.yaml`, `.json`, and in the files of a directory of that name.
fn vars_of(files: &dyn Files, directory: &Utf8Path, name: &str) -> Result<Vars, InventoryError> {
    let mut paths: Vec<_> = ["", ".json", ".yaml", ".yml"]
        .iter()
        .map(|suffix| directory.join(format!("{name}{suffix}")))
        .collect();
    let cannot =
        |path: &Utf8Path, e: std::io::Error| InventoryError::new(&Place::new(path, 0), format!("can't be read: {e}"));
    let inside = directory.join(name);
    let listed = files.list(&inside).map_err(|e| cannot(&inside, e))?;
    if !listed.is_empty() {
        paths.remove(0);
    }
    let read = |path: &Utf8Path| matches!(path.extension(), None | Some("json" | "yaml" | "yml"));
    paths.extend(listed.into_iter().filter(|path| read(path)));
    let mut vars = Vars::new();
    for path in paths {
        let Some(text) = files.read(&path).map_err(|e| cannot(&path, e))? else {
            continue;
        };
        // A vault as a whole can only hold secrets, and those aren't asked for.
        if text.starts_with("$ANSIBLE_VAULT") || text.trim().is_empty() {
            continue;
        }
        let document = yaml::parse(&path, &text)?;
        let entries = document
            .entries()
            .ok_or_else(|| InventoryError::new(&Place::new(&path, document.line), "variables have to be a map"))?;
        for (key, node) in entries {
            let place = Place::new(&path, key.line);
            let value = node.value.clone();
            vars.insert(key.name.clone(), Var { value, place });
        }
    }
    Ok(vars)
}
