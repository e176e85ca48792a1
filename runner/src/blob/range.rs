//! The `Range` header (RFC 9110, section 14).

/// What a `Range` header asks for, of an object of a known size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The whole: no header, several ranges, or one that this server need not understand.
    Whole,
    /// From the first to before the second.
    Part(u64, u64),
    /// Nothing that the object has.
    Nothing,
}

/// Reads the header.
pub(super) fn parse(header: Option<&str>, size: u64) -> Wanted {
    let Some(range) = header.and_then(|header| header.trim().strip_prefix("bytes=")) else {
        return Wanted::Whole;
    };
    let Some((first, last)) = range.split_once('-') else { return Wanted::Whole };
    let (first, last) = (first.trim(), last.trim());
    let number = |text: &str| -> Option<u64> {
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        // A number that is too large is beyond every object.
        Some(text.parse().unwrap_or(u64::MAX))
    };
    match (number(first), number(last)) {
        // The last so many bytes.
        (None, Some(length)) if first.is_empty() => match length.min(size) {
            0 => Wanted::Nothing,
            length => Wanted::Part(size - length, size),
        },
        (Some(first), None) if last.is_empty() => {
            if first < size {
                Wanted::Part(first, size)
            } else {
                Wanted::Nothing
            }
        }
        (Some(first), Some(last)) if first <= last => {
            if first < size {
                Wanted::Part(first, last.saturating_add(1).min(size))
            } else {
                Wanted::Nothing
            }
        }
        _ => Wanted::Whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_the_rfc_says() {
        for (header, size, wanted) in [
            ("bytes=0-0", 10, Wanted::Part(0, 1)),
            ("bytes=2-5", 10, Wanted::Part(2, 6)),
            ("bytes=2-", 10, Wanted::Part(2, 10)),
            ("bytes=2-99999999999999999999999", 10, Wanted::Part(2, 10)),
            ("bytes=-3", 10, Wanted::Part(7, 10)),
            ("bytes=-30", 10, Wanted::Part(0, 10)),
            ("bytes=10-", 10, Wanted::Nothing),
            ("bytes=10-12", 10, Wanted::Nothing),
            ("bytes=-0", 10, Wanted::Nothing),
            ("bytes=-5", 0, Wanted::Nothing),
            ("bytes=0-", 0, Wanted::Nothing),
            ("bytes=5-2", 10, Wanted::Whole),
            ("bytes=0-1,3-4", 10, Wanted::Whole),
            ("bytes=x-", 10, Wanted::Whole),
            ("bytes=+1-2", 10, Wanted::Whole),
            ("lines=0-1", 10, Wanted::Whole),
        ] {
            assert_eq!(parse(Some(header), size), wanted, "{header} of {size}");
        }
        assert_eq!(parse(None, 10), Wanted::Whole);
    }
}
