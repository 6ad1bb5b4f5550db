//! Words as a shell splits them (Python's `shlex`, which Ansible uses): quotes, backslashes, comments.

/// Splits a line into words. The error says what is wrong.
pub(super) fn split(line: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut characters = line.chars();
    while let Some(c) = characters.next() {
        match c {
            // In a word, too, once a space stands before it; `a#b` is a word.
            '#' if word.is_none() => break,
            c if c.is_whitespace() => words.extend(word.take()),
            '\'' | '"' => {
                let current = word.get_or_insert_default();
                loop {
                    match characters.next() {
                        None => return Err(format!("a quote ({c}) is never closed")),
                        Some(next) if next == c => break,
                        Some('\\') if c == '"' => match characters.next() {
                            Some(escaped @ ('"' | '\\')) => current.push(escaped),
                            Some(other) => current.extend(['\\', other]),
                            None => return Err(format!("a quote ({c}) is never closed")),
                        },
                        Some(next) => current.push(next),
                    }
                }
            }
            '\\' => word
                .get_or_insert_default()
                .push(characters.next().ok_or("it ends in a backslash")?),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_as_a_shell_does() {
        let cases: &[(&str, &[&str])] = &[
            ("a b=c  # d", &["a", "b=c"]),
            ("a b='c d' e=\"f \\\"g\\\"\"", &["a", "b=c d", "e=f \"g\""]),
            ("a#b \\# ''", &["a#b", "#", ""]),
            ("", &[]),
        ];
        for (line, expected) in cases {
            assert_eq!(split(line).unwrap(), *expected, "{line}");
        }
        assert!(split("a 'b").unwrap_err().contains("never closed"));
        assert!(split("a \"b\\").unwrap_err().contains("never closed"));
    }
}
