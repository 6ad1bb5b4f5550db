//! Ansible's YAML inventories.

use camino::Utf8Path;

use super::super::error::{InventoryError, Place};
use super::super::yaml::{Node, Value};
use super::groups::{Groups, Var, Vars};
use super::range;

/// Takes a parsed document apart.
pub(super) fn parse(file: &Utf8Path, document: &Node) -> Result<Groups, InventoryError> {
    let mut groups = Groups::default();
    let top = document.entries().ok_or_else(|| {
        InventoryError::new(
            &Place::new(file, document.line),
            "an inventory has to be a map of groups",
        )
    })?;
    for (name, node) in top {
        group(&mut groups, file, &name.name, name.line, node)?;
    }
    Ok(groups)
}

fn group(groups: &mut Groups, file: &Utf8Path, name: &str, line: usize, node: &Node) -> Result<(), InventoryError> {
    groups.group(name).defined = true;
    let parts = node.entries().ok_or_else(|| {
        InventoryError::new(&Place::new(file, line), format!("the group `{name}` has to be a map"))
            .hint("a group has `hosts`, `children` and `vars`, each a map")
    })?;
    for (part, node) in parts {
        let place = Place::new(file, part.line);
        let entries = node.entries().ok_or_else(|| {
            InventoryError::new(&place, format!("`{}` of the group `{name}` has to be a map", part.name))
                .hint("end each name in a colon: `node1:`")
        })?;
        match part.name.as_str() {
            "hosts" => {
                for (pattern, node) in entries {
                    let place = Place::new(file, pattern.line);
                    let vars = vars(file, node).ok_or_else(|| {
                        InventoryError::new(&place, "its variables have to be a map").of(&pattern.name)
                    })?;
                    for host in range::expand(&pattern.name).map_err(|why| InventoryError::new(&place, why))? {
                        groups.add_host(name, &host, vars.clone(), &place);
                    }
                }
            }
            "children" => {
                for (child, node) in entries {
                    let place = Place::new(file, child.line);
                    groups.group(name).children.insert(child.name.clone(), place);
                    group(groups, file, &child.name, child.line, node)?;
                }
            }
            "vars" => {
                let vars = vars(file, node).unwrap_or_default();
                groups.group(name).vars.extend(vars);
            }
            other => {
                return Err(InventoryError::new(
                    &place,
                    format!("the group `{name}` has `{other}`, which is not known"),
                )
                .hint("a group has `hosts`, `children` and `vars`"));
            }
        }
    }
    Ok(())
}

/// Variables as a map; `None` where it's something else.
fn vars(file: &Utf8Path, node: &Node) -> Option<Vars> {
    if node.value == Value::Null {
        return Some(Vars::new());
    }
    let entries = node.entries()?;
    Some(
        entries
            .iter()
            .map(|(key, node)| {
                let place = Place::new(file, key.line);
                let value = node.value.clone();
                (key.name.clone(), Var { value, place })
            })
            .collect(),
    )
}
