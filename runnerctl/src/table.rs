//! Columns.

/// Rows under a head, each column as wide as its widest cell, the last one as it is.
pub(crate) fn render(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let head = head.iter().map(|cell| (*cell).to_owned()).collect();
    let mut text = String::new();
    for row in std::iter::once(&head).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            let missing = width.saturating_sub(cell.chars().count());
            line.extend(std::iter::repeat_n(' ', missing + 2));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// `Name:  value`, aligned. Entries without a value are left out.
pub(crate) fn facts(entries: &[(&str, String)]) -> String {
    let width = entries.iter().filter(|(_, value)| !value.is_empty()).map(|(name, _)| name.len()).max();
    let width = width.unwrap_or_default() + 1;
    let mut text = String::new();
    for (name, value) in entries.iter().filter(|(_, value)| !value.is_empty()) {
        text.push_str(&format!("{:<width$}  {value}\n", format!("{name}:")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_without_blanks() {
        let rows =
            [vec!["a".to_owned(), "é".to_owned(), String::new()], vec!["bbb".into(), "c".into(), "d".into()]];
        assert_eq!(render(&["X", "YY", "Z"], &rows), "X    YY  Z\na    é\nbbb  c   d\n");
    }

    #[test]
    fn facts_without_a_value_are_left_out() {
        assert_eq!(
            facts(&[("Id", "1".into()), ("None", String::new()), ("State", "x".into())]),
            "Id:     1\nState:  x\n"
        );
    }
}
