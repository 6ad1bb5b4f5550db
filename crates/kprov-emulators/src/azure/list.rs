//! Lists: which resources, in which form, page by page.

use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use super::catalogue::{canonical, check_location};
use super::handle::Call;
use super::refusal::Refusal;
use super::route::Route;
use super::server::{Reply, escaped};
use super::store::{Resource, Store, text};

/// One comparison of a `$filter`.
#[derive(Debug)]
struct Condition {
    field: String,
    value: String,
}

impl Store {
    pub(super) fn list(&self, call: &Call) -> Result<Reply, Refusal> {
        let now = Instant::now();
        let listed = |r: &&Resource| r.listed <= now;
        let filter = filter(call)?;
        let items: Vec<Value> = match &call.route {
            Route::Groups => {
                let tag = tag_of(&filter, "resource group", call)?;
                self.groups
                    .values()
                    .filter(|g| tagged(g.tags.as_ref(), tag))
                    .map(|g| self.render_group(g))
                    .collect()
            }
            Route::Resources(group) => return self.list_resources(call, group.as_deref(), &filter),
            Route::Skus => {
                let location = only(&filter, "location", call)?;
                self.skus(location.map(canonical).as_deref())
            }
            Route::Usages(location) => self.usages(&check_location(location, "Microsoft.Compute/locations/usages")?),
            Route::ImageVersions {
                location,
                publisher,
                offer,
                sku,
            } => {
                return self
                    .image_versions(location, publisher, offer, sku)
                    .map(|v| Reply::with(200, &v));
            }
            Route::List(kind, group) => {
                if let Some(group) = group {
                    self.group(group)?;
                }
                let status = call.parameter("statusonly") == Some("true");
                if call.parameter("$expand").is_some() && filter.is_empty() {
                    return Err(Refusal::new(
                        400,
                        "InvalidParameter",
                        "$expand can be given with a valid $filter alone; statusOnly=true lists the status of all machines.",
                    )
                    .target("$expand"));
                }
                let uses = self.uses();
                self.of_kind(kind.plural)
                    .filter(|r| group.as_ref().is_none_or(|g| g.eq_ignore_ascii_case(&r.group)))
                    .filter(listed)
                    .map(|r| {
                        if status && r.is("virtualMachines") {
                            Self::render_status(r)
                        } else {
                            self.render(r, &uses)
                        }
                    })
                    .collect()
            }
            Route::Subnets(group, network) => {
                let parent =
                    super::kind::Kind::named("virtualNetworks").and_then(|k| self.get(&self.id(group, k, network)));
                let parent =
                    parent.ok_or_else(|| Refusal::not_found("Microsoft.Network/virtualNetworks", network, group))?;
                let rendered = self.render(parent, &self.uses());
                rendered
                    .pointer("/properties/subnets")
                    .and_then(Value::as_array)
                    .cloned()
                    .unwrap_or_default()
            }
            _ => Vec::new(),
        };
        self.page(call, &items)
    }

    /// Resources of all types. With a filter by tag their tags aren't shown, as Azure's documentation of "Resources - List" says.
    fn list_resources(&self, call: &Call, group: Option<&str>, filter: &[Condition]) -> Result<Reply, Refusal> {
        let now = Instant::now();
        if let Some(group) = group {
            self.group(group)?;
        }
        let by_tag = filter.iter().any(|c| c.field.starts_with("tag"));
        let tag = if by_tag {
            tag_of(filter, "resource", call)?
        } else {
            None
        };
        let mut kept = Vec::new();
        for resource in self.resources.values().filter(|r| r.listed <= now) {
            let mut matches = group.is_none_or(|g| g.eq_ignore_ascii_case(&resource.group));
            for condition in filter.iter().filter(|_| !by_tag) {
                matches &= match condition.field.as_str() {
                    "resourcetype" => resource.kind.full().eq_ignore_ascii_case(&condition.value),
                    "resourcegroup" => resource.group.eq_ignore_ascii_case(&condition.value),
                    "location" => resource.location() == canonical(&condition.value),
                    "name" => resource.name.eq_ignore_ascii_case(&condition.value),
                    _ => return Err(bad_filter(call)),
                };
            }
            if matches && (!by_tag || tagged(resource.body.get("tags"), tag)) {
                kept.push(Self::render_briefly(resource, !by_tag));
            }
        }
        self.page(call, &kept)
    }

    /// One page, and where the next is.
    fn page(&self, call: &Call, items: &[Value]) -> Result<Reply, Refusal> {
        let key = |item: &Value| {
            text(item, "/id")
                .or_else(|| text(item, "/name"))
                .unwrap_or_default()
                .to_ascii_lowercase()
        };
        let start = match call.parameter("$skiptoken") {
            None => 0,
            Some(token) => {
                let last = URL_SAFE_NO_PAD
                    .decode(token)
                    .ok()
                    .and_then(|b| String::from_utf8(b).ok());
                let last = last.ok_or_else(|| {
                    Refusal::new(400, "InvalidSkipToken", format!("The skip token '{token}' is invalid."))
                })?;
                // Unsorted lists (sizes) count instead.
                match last.parse::<usize>() {
                    Ok(index) => index,
                    Err(_) => items.iter().position(|i| key(i) > last).unwrap_or(items.len()),
                }
            }
        };
        let most = call
            .parameter("$top")
            .and_then(|t| t.parse().ok())
            .unwrap_or(self.options.page)
            .max(1);
        let rest = items.get(start..).unwrap_or_default();
        let page = &rest[..most.min(rest.len())];
        let mut reply = json!({"value": page});
        if rest.len() > page.len()
            && let Some(last) = page.last()
        {
            let token = if text(last, "/id").is_some() {
                key(last)
            } else {
                (start + page.len()).to_string()
            };
            let mut query = call.query.clone();
            query.insert("$skiptoken".to_owned(), URL_SAFE_NO_PAD.encode(token));
            let query: Vec<String> = query
                .iter()
                .map(|(k, v)| format!("{}={}", escaped(k), escaped(v)))
                .collect();
            reply["nextLink"] = json!(format!("{}{}?{}", self.endpoint, call.path, query.join("&")));
        }
        Ok(Reply::with(200, &reply))
    }
}

/// `a eq 'b' and c eq 'd'`, and nothing else.
fn filter(call: &Call) -> Result<Vec<Condition>, Refusal> {
    let Some(text) = call.parameter("$filter") else {
        return Ok(Vec::new());
    };
    text.split(" and ")
        .map(|part| {
            let (field, value) = part.trim().split_once(" eq ").ok_or_else(|| bad_filter(call))?;
            let value = value
                .trim()
                .strip_prefix('\'')
                .and_then(|v| v.strip_suffix('\''))
                .ok_or_else(|| bad_filter(call))?;
            let value = value.replace("''", "'");
            Ok(Condition {
                field: field.trim().to_ascii_lowercase(),
                value,
            })
        })
        .collect()
}

fn bad_filter(call: &Call) -> Refusal {
    Refusal::new(
        400,
        "InvalidFilterInQueryString",
        format!(
            "Invalid $filter '{}' specified in the query string.",
            call.parameter("$filter").unwrap_or_default()
        ),
    )
}

/// A filter by tag: its name, and its value where one is given. It can't be combined with anything else.
fn tag_of<'a>(filter: &'a [Condition], what: &str, call: &Call) -> Result<Option<(&'a str, Option<&'a str>)>, Refusal> {
    tracing::trace!(what, "filter by tag");
    match filter {
        [] => Ok(None),
        [name] if name.field == "tagname" => Ok(Some((&name.value, None))),
        [name, value] if name.field == "tagname" && value.field == "tagvalue" => {
            Ok(Some((&name.value, Some(&value.value))))
        }
        _ => Err(bad_filter(call)),
    }
}

/// A filter by this field alone.
fn only<'a>(filter: &'a [Condition], field: &str, call: &Call) -> Result<Option<&'a str>, Refusal> {
    match filter {
        [] => Ok(None),
        [one] if one.field == field => Ok(Some(&one.value)),
        _ => Err(bad_filter(call)),
    }
}

fn tagged(tags: Option<&Value>, want: Option<(&str, Option<&str>)>) -> bool {
    let Some((name, value)) = want else {
        return true;
    };
    let tags = tags.and_then(Value::as_object);
    tags.into_iter()
        .flatten()
        .any(|(k, v)| k.eq_ignore_ascii_case(name) && value.is_none_or(|want| v.as_str() == Some(want)))
}
