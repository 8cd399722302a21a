//! Debian's control format: stanzas of `Field: value`, as `apt-cache show`, `dpkg-deb -f` and Release
//! files have them (deb822(5)).

use std::collections::BTreeMap;

/// One stanza; field names in lower case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Stanza(BTreeMap<String, String>);

impl Stanza {
    /// The value of a field, its continuation lines joined by newlines.
    pub(crate) fn get(&self, field: &str) -> Option<&str> {
        self.0.get(&field.to_ascii_lowercase()).map(String::as_str)
    }
}

/// Every stanza of `text`. Lines that are neither field nor continuation are passed over: what matters
/// of a stanza is checked by whoever asks for a field.
pub(crate) fn parse(text: &str) -> Vec<Stanza> {
    let mut stanzas = Vec::new();
    let mut stanza = Stanza::default();
    let mut last: Option<String> = None;
    for line in text.lines() {
        if line.trim().is_empty() {
            if !stanza.0.is_empty() {
                stanzas.push(std::mem::take(&mut stanza));
            }
            last = None;
        } else if line.starts_with([' ', '\t']) {
            if let Some(value) = last.as_ref().and_then(|field| stanza.0.get_mut(field)) {
                value.push('\n');
                value.push_str(line.trim());
            }
        } else if let Some((field, value)) = line.split_once(':') {
            let field = field.to_ascii_lowercase();
            stanza.0.insert(field.clone(), value.trim().to_owned());
            last = Some(field);
        }
    }
    if !stanza.0.is_empty() {
        stanzas.push(stanza);
    }
    stanzas
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stanzas_and_continuations_are_read() {
        let stanzas = parse("Package: a\nDescription: first\n second\n .\n\n\nPackage: b\nSHA256:00\n");
        assert_eq!(stanzas.len(), 2);
        assert_eq!(stanzas[0].get("description"), Some("first\nsecond\n."));
        assert_eq!((stanzas[1].get("Package"), stanzas[1].get("SHA256")), (Some("b"), Some("00")));
    }

    #[test]
    fn rubbish_gives_no_field() {
        assert_eq!(parse(" lonely continuation\n\u{0}\nno colon\n"), []);
    }
}
