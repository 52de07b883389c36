//! Aligned columns.

use std::fmt;

/// Rows under a head. Columns whose head begins with `>` are aligned to the right.
#[derive(Debug)]
pub(crate) struct Table {
    head: &'static [&'static str],
    indent: usize,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(indent: usize, head: &'static [&'static str]) -> Self {
        Self { head, indent, rows: Vec::new() }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.head.len());
        self.rows.push(cells);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let titles = self.head.iter().map(|title| title.trim_start_matches('>'));
        let head: Vec<String> = titles.map(str::to_owned).collect();
        let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        for row in std::iter::once(&head).chain(&self.rows) {
            let mut line = " ".repeat(self.indent);
            for ((cell, &width), title) in row.iter().zip(&widths).zip(self.head) {
                match title.starts_with('>') {
                    true => line += &format!("{cell:>width$}  "),
                    false => line += &format!("{cell:<width$}  "),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(2, &["NAME", ">COUNT", "REST"]);
        table.row(vec!["é".into(), "7".into(), "x".into()]);
        table.row(vec!["longer".into(), "123456".into(), String::new()]);
        assert_eq!(table.to_string(), "  NAME     COUNT  REST\n  é            7  x\n  longer  123456\n");
    }
}
