//! Ansible's INI inventories.

use camino::Utf8Path;

use super::super::error::{InventoryError, Place};
use super::super::yaml::Value;
use super::groups::{Groups, Var, Vars};
use super::{range, words};

/// What the lines below a heading are.
enum Section {
    Hosts(String),
    Children(String),
    Vars(String),
}

/// Parses an inventory.
pub(super) fn parse(file: &Utf8Path, text: &str) -> Result<Groups, InventoryError> {
    let mut groups = Groups::default();
    let mut section = Section::Hosts("ungrouped".into());
    for (index, line) in text.lines().enumerate() {
        let place = Place::new(file, index + 1);
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(heading) = line.strip_prefix('[')
            && !line.contains('=')
            && let Some(name) = heading
                .split_once(']')
                .filter(|(_, rest)| is_comment(rest))
                .map(|(name, _)| name)
        {
            section = heading_of(name.trim(), &place)?;
            match &section {
                Section::Hosts(group) | Section::Children(group) => groups.group(group).defined = true,
                // Variables of a group that is nowhere else are an oversight, but no harm.
                Section::Vars(_) => {}
            }
            continue;
        }
        match &section {
            Section::Hosts(group) => host_line(&mut groups, group, line, &place)?,
            Section::Children(group) => {
                let child = words::split(line).map_err(|why| InventoryError::new(&place, why))?;
                let [child] = child.as_slice() else {
                    return Err(InventoryError::new(
                        &place,
                        format!("`{line}` is not the name of one group"),
                    ));
                };
                groups.group(group).children.insert(child.clone(), place);
            }
            Section::Vars(group) => {
                let (name, value) = line
                    .split_once('=')
                    .ok_or_else(|| InventoryError::new(&place, format!("`{line}` is not `name=value`")))?;
                let value = literal(value.trim());
                groups
                    .group(group)
                    .vars
                    .insert(name.trim().to_owned(), Var { value, place });
            }
        }
    }
    Ok(groups)
}

fn is_comment(rest: &str) -> bool {
    let rest = rest.trim();
    rest.is_empty() || rest.starts_with(['#', ';'])
}

fn heading_of(heading: &str, place: &Place) -> Result<Section, InventoryError> {
    let (name, kind) = heading.split_once(':').unwrap_or((heading, "hosts"));
    if name.is_empty() || name.contains(char::is_whitespace) {
        return Err(InventoryError::new(place, format!("`[{heading}]` names no group")));
    }
    match kind {
        "hosts" => Ok(Section::Hosts(name.into())),
        "children" => Ok(Section::Children(name.into())),
        "vars" => Ok(Section::Vars(name.into())),
        other => Err(
            InventoryError::new(place, format!("`[{heading}]` ends in `:{other}`, which is not known"))
                .hint("there are `[group]`, `[group:children]` and `[group:vars]`"),
        ),
    }
}

fn host_line(groups: &mut Groups, group: &str, line: &str, place: &Place) -> Result<(), InventoryError> {
    let all = words::split(line).map_err(|why| InventoryError::new(place, why))?;
    let Some((pattern, settings)) = all.split_first() else {
        return Ok(());
    };
    if pattern.contains('=') {
        return Err(
            InventoryError::new(place, format!("`{pattern}` stands where a host's name is expected"))
                .hint("variables of a group stand below `[group:vars]`"),
        );
    }
    let mut vars = Vars::new();
    let (pattern, port) = with_port(pattern);
    if let Some(port) = port {
        let value = Value::Scalar(port.to_owned());
        let place = place.clone();
        vars.insert("ansible_port".into(), Var { value, place });
    }
    for setting in settings {
        let (name, value) = setting.split_once('=').ok_or_else(|| {
            InventoryError::new(place, format!("`{setting}` is not `name=value`"))
                .of(pattern)
                .hint("put values with spaces into quotes")
        })?;
        let (value, place) = (literal(value), place.clone());
        vars.insert(name.to_owned(), Var { value, place });
    }
    for host in range::expand(pattern).map_err(|why| InventoryError::new(place, why))? {
        groups.add_host(group, &host, vars.clone(), place);
    }
    Ok(())
}

/// `name:port`, where what follows the last colon is a number and the colon is not a range's.
fn with_port(pattern: &str) -> (&str, Option<&str>) {
    match pattern.rsplit_once(':') {
        Some((name, port)) if !name.is_empty() && !name.contains("::") && port.parse::<u16>().is_ok() => {
            (name, Some(port))
        }
        _ => (pattern, None),
    }
}

/// A value as Ansible takes it: a Python literal where it is one, else the text.
fn literal(text: &str) -> Value {
    match text {
        "True" | "true" => return Value::Bool(true),
        "False" | "false" => return Value::Bool(false),
        "None" => return Value::Null,
        _ => {}
    }
    for quote in ['"', '\''] {
        if let Some(inner) = text.strip_prefix(quote).and_then(|t| t.strip_suffix(quote))
            && !inner.contains(quote)
        {
            return Value::Scalar(inner.to_owned());
        }
    }
    // `{'a': 'b'}` is read as YAML's flow form, which it is.
    if text.starts_with('{')
        && let Ok(node) = serde_saphyr::from_str::<super::super::yaml::Node>(text)
    {
        return node.value;
    }
    Value::Scalar(text.to_owned())
}
