//! What machines boot: an image by its short name, its URN, or its resource id. Pure.

use kprov_provider::ProviderError;

/// The image where none is named.
const DEFAULT: &str = "debian-12";
/// Flatcar's publisher, whose images take Ignition where others take a script.
const FLATCAR: &str = "kinvolk";

/// An image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Image {
    /// From the marketplace.
    Marketplace {
        publisher: String,
        offer: String,
        sku: String,
        version: String,
    },
    /// By resource id: a managed image, or one of a gallery.
    Id(String),
}

impl Image {
    /// From what a cluster file says.
    pub(crate) fn parse(text: Option<&str>) -> Result<Self, ProviderError> {
        let text = text.unwrap_or(DEFAULT);
        let urn = match text {
            "debian-12" => "Debian:debian-12:12-gen2:latest",
            "flatcar" => "kinvolk:flatcar-container-linux-free:stable-gen2:latest",
            other => other,
        };
        if urn.starts_with('/') {
            return Ok(Self::Id(urn.to_owned()));
        }
        match urn.split(':').collect::<Vec<_>>().as_slice() {
            [publisher, offer, sku, version] if !urn.split(':').any(str::is_empty) => Ok(Self::Marketplace {
                publisher: (*publisher).to_owned(),
                offer: (*offer).to_owned(),
                sku: (*sku).to_owned(),
                version: (*version).to_owned(),
            }),
            _ => Err(ProviderError::never(format!("`spec.image`: `{text}` is no image of Azure's")).hint(
                "use `debian-12`, `flatcar`, a URN such as `Debian:debian-12:12-gen2:latest`, or an image's resource id",
            )),
        }
    }

    /// Whether machines read Ignition at first boot instead of a script.
    pub(crate) fn is_flatcar(&self) -> bool {
        match self {
            Self::Marketplace { publisher, .. } => publisher.eq_ignore_ascii_case(FLATCAR),
            Self::Id(id) => id.to_ascii_lowercase().contains("flatcar"),
        }
    }

    /// Whether it can start with Secure Boot and a virtual TPM: known of Debian's own images for generation 2 alone.
    pub(crate) fn has_trusted_launch(&self) -> bool {
        matches!(self, Self::Marketplace { publisher, sku, .. } if publisher.eq_ignore_ascii_case("Debian") && sku.ends_with("gen2"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_urns_and_ids() {
        let default = Image::parse(None).unwrap();
        assert_eq!(default, Image::parse(Some("Debian:debian-12:12-gen2:latest")).unwrap());
        assert!(default.has_trusted_launch() && !default.is_flatcar());
        let flatcar = Image::parse(Some("flatcar")).unwrap();
        assert!(flatcar.is_flatcar() && !flatcar.has_trusted_launch());
        let id = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Compute/images/mine";
        assert_eq!(Image::parse(Some(id)).unwrap(), Image::Id(id.into()));
        for bad in ["ubuntu", "a:b:c", "a::c:d", ""] {
            assert!(Image::parse(Some(bad)).unwrap_err().hint.is_some(), "{bad}");
        }
    }
}
