//! As much of XML as the Query APIs of AWS answer with: elements and text. Attributes go with the name.

/// An element.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Element {
    /// Its name, and its attributes as they were written.
    head: String,
    /// What is in it.
    pub(super) children: Vec<Element>,
    /// Its text, unescaped; only elements without children keep any.
    pub(super) text: String,
}

impl Element {
    /// An element with text alone.
    pub(super) fn leaf(name: &str, text: impl Into<String>) -> Self {
        Self {
            head: name.to_owned(),
            children: Vec::new(),
            text: text.into(),
        }
    }

    /// An element with others in it.
    pub(super) fn node(name: &str, children: Vec<Element>) -> Self {
        Self {
            head: name.to_owned(),
            children,
            text: String::new(),
        }
    }

    /// The root element of a document; `None` for what is none.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut stack: Vec<Self> = vec![Self::default()];
        let mut rest = text;
        while let Some(open) = rest.find('<') {
            let (before, after) = (&rest[..open], &rest[open + 1..]);
            let close = after.find('>')?;
            let (tag, behind) = (&after[..close], &after[close + 1..]);
            let top = stack.last_mut()?;
            if !before.trim().is_empty() {
                top.text = unescape(before.trim());
            }
            if tag.starts_with('/') {
                let done = stack.pop()?;
                stack.last_mut()?.children.push(done);
            } else if let Some(head) = tag.strip_suffix('/') {
                top.children.push(Self::leaf(head.trim_end(), ""));
            } else if !tag.starts_with(['?', '!']) {
                stack.push(Self::leaf(tag, ""));
            }
            rest = behind;
        }
        let mut document = stack.pop().filter(|_| stack.is_empty())?;
        document.children.pop()
    }

    /// As a document.
    pub(super) fn document(&self) -> String {
        let mut text = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
        self.write(&mut text);
        text
    }

    fn write(&self, to: &mut String) {
        let Self { head, children, text } = self;
        to.push('<');
        to.push_str(head);
        to.push('>');
        if children.is_empty() {
            to.push_str(&escape(text));
        } else {
            for child in children {
                child.write(to);
            }
        }
        to.push_str("</");
        to.push_str(self.name());
        to.push('>');
    }

    /// Its name.
    pub(super) fn name(&self) -> &str {
        self.head.split_whitespace().next().unwrap_or_default()
    }

    /// The child of this name.
    pub(super) fn child(&self, name: &str) -> Option<&Self> {
        self.children.iter().find(|c| c.name() == name)
    }

    /// The text of the child of this name.
    pub(super) fn child_text(&self, name: &str) -> Option<&str> {
        self.child(name).map(|c| c.text.as_str())
    }

    /// All elements of this name, at any depth.
    pub(super) fn all(&self, name: &str) -> Vec<&Self> {
        let mut found = Vec::new();
        for child in &self.children {
            if child.name() == name {
                found.push(child);
            }
            found.extend(child.all(name));
        }
        found
    }

    /// The text of all elements of this name, at any depth.
    pub(super) fn texts(&self, name: &str) -> Vec<String> {
        self.all(name).into_iter().map(|e| e.text.clone()).collect()
    }

    /// Changes every element, from the inside out.
    pub(super) fn each(&mut self, change: &mut dyn FnMut(&mut Element)) {
        for child in &mut self.children {
            child.each(change);
        }
        change(self);
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn unescape(text: &str) -> String {
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&#34;", "\"")
        .replace("&#39;", "'")
        .replace("&amp;", "&")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes() {
        let text = "<?xml version=\"1.0\"?><a xmlns=\"x\"><b> 1 &lt; 2 </b><c/><d><e>é</e><e>f</e></d></a>";
        let root = Element::parse(text).unwrap();
        assert_eq!(root.name(), "a");
        assert_eq!(root.child_text("b"), Some("1 < 2"));
        assert_eq!(root.texts("e"), ["é", "f"]);
        assert_eq!(Element::parse(&root.document()), Some(root.clone()));
        assert!(root.document().contains("<a xmlns=\"x\"><b>1 &lt; 2</b><c></c>"));
        assert_eq!(Element::parse("<a><b></a>"), None);
    }
}
