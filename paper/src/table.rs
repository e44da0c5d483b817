//! Tables as LaTeX, Markdown and CSV.

use std::fmt::Write;

/// Title of a column; LaTeX has its own where there is mathematics in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Column {
    pub(crate) plain: &'static str,
    /// None if it is not for print.
    latex: Option<Title>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Title {
    Plain,
    Math(&'static str),
}

impl Column {
    pub(crate) const fn new(plain: &'static str) -> Self {
        let latex = Some(Title::Plain);
        Self { plain, latex }
    }

    pub(crate) const fn math(plain: &'static str, latex: &'static str) -> Self {
        let latex = Some(Title::Math(latex));
        Self { plain, latex }
    }

    /// Says where a row is from, which no paper prints.
    pub(crate) const fn origin(plain: &'static str) -> Self {
        Self { plain, latex: None }
    }
}

/// Rows of text. An empty cell is one that has no value there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) columns: Vec<Column>,
    /// Each as long as `columns`.
    pub(crate) rows: Vec<Vec<String>>,
    /// So many columns at the left are headings of groups of rows: in LaTeX a heading stands once.
    pub(crate) n_headings: usize,
}

/// What stands where there is no value.
const NONE: &str = "–";

impl Table {
    pub(crate) fn latex(&self) -> String {
        let titles = self
            .columns
            .iter()
            .filter_map(|column| match column.latex? {
                Title::Plain => Some(escaped(column.plain)),
                Title::Math(latex) => Some(latex.to_owned()),
            });
        let titles: Vec<String> = titles.collect();
        let alignment: String = (0..titles.len())
            .map(|index| if index <= self.n_headings { 'l' } else { 'r' })
            .collect();
        let mut text = format!(
            "% Needs the packages booktabs and multirow.\n\\begin{{tabular}}{{{alignment}}}\n\\toprule\n{} \\\\\n\\midrule\n",
            titles.join(" & ")
        );
        for (index, row) in self.rows.iter().enumerate() {
            if index > 0 {
                text.push_str(&self.rule(index, titles.len()));
            }
            let cells = row.iter().enumerate().filter_map(|(column, cell)| {
                self.columns[column].latex?;
                if column >= self.n_headings {
                    return Some(if cell.is_empty() {
                        "--".to_owned()
                    } else {
                        escaped(cell)
                    });
                }
                Some(match self.n_alike(index, column) {
                    0 => String::new(),
                    1 => escaped(cell),
                    n => format!("\\multirow{{{n}}}{{*}}{{{}}}", escaped(cell)),
                })
            });
            let cells: Vec<String> = cells.collect();
            let _ = writeln!(text, "{} \\\\", cells.join(" & "));
        }
        text.push_str("\\bottomrule\n\\end{tabular}\n");
        text
    }

    pub(crate) fn markdown(&self) -> String {
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let titles = self.columns.iter().map(|column| column.plain.to_owned());
        let rules = (0..self.columns.len()).map(|index| {
            let rule = if index <= self.n_headings {
                "---"
            } else {
                "--:"
            };
            rule.to_owned()
        });
        let mut text = line(titles.collect()) + &line(rules.collect());
        for row in &self.rows {
            let cells = row.iter().map(|cell| match cell.as_str() {
                "" => NONE.to_owned(),
                cell => cell.replace('|', "\\|"),
            });
            text.push_str(&line(cells.collect()));
        }
        text
    }

    pub(crate) fn csv(&self) -> String {
        let quoted = |cell: &str| {
            if cell.contains([',', '"', '\n', '\r']) {
                format!("\"{}\"", cell.replace('"', "\"\""))
            } else {
                cell.to_owned()
            }
        };
        let line = |cells: Vec<String>| cells.join(",") + "\n";
        let mut text = line(
            self.columns
                .iter()
                .map(|column| quoted(column.plain))
                .collect(),
        );
        for row in &self.rows {
            text.push_str(&line(row.iter().map(|cell| quoted(cell)).collect()));
        }
        text
    }

    /// The line above a row: over everything where the first heading changes, else from the heading on that does.
    fn rule(&self, index: usize, n_columns: usize) -> String {
        let changed = (0..self.n_headings).find(|&column| self.n_alike(index, column) > 0);
        match changed {
            Some(0) => "\\midrule\n".to_owned(),
            Some(column) => format!("\\cmidrule{{{}-{n_columns}}}\n", column + 1),
            None => String::new(),
        }
    }

    /// Rows from `index` on with the same headings up to `column`; 0 if the row above is one of them.
    fn n_alike(&self, index: usize, column: usize) -> usize {
        let headings = |row: &Vec<String>| row[..=column].to_vec();
        let own = headings(&self.rows[index]);
        if index > 0 && headings(&self.rows[index - 1]) == own {
            return 0;
        }
        let below = self.rows[index..].iter();
        below.take_while(|row| headings(row) == own).count()
    }
}

/// Text as LaTeX takes it.
fn escaped(text: &str) -> String {
    let mut latex = String::new();
    for c in text.chars() {
        match c {
            '&' | '%' | '$' | '#' | '_' | '{' | '}' => latex.extend(['\\', c]),
            '\\' => latex.push_str("\\textbackslash{}"),
            '~' => latex.push_str("\\textasciitilde{}"),
            '^' => latex.push_str("\\textasciicircum{}"),
            'σ' => latex.push_str("$\\sigma$"),
            '×' => latex.push_str("$\\times$"),
            '–' => latex.push_str("--"),
            c => latex.push(c),
        }
    }
    latex
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let row = |cells: [&str; 4]| cells.map(str::to_owned).to_vec();
        Table {
            columns: vec![
                Column::new("Dataset"),
                Column::new("Model"),
                Column::math("d_model", "$d_\\text{model}$"),
                Column::origin("Run"),
            ],
            rows: vec![
                row(["C4", "σ-MoE", "1,5", "x"]),
                row(["C4", "A_B", "", "y"]),
                row(["peS2o", "a|b", "2×3", "z"]),
            ],
            n_headings: 1,
        }
    }

    #[test]
    fn headings_span_their_rows() {
        let latex = table().latex();
        let lines: Vec<&str> = latex.lines().skip(1).collect();
        assert_eq!(
            lines,
            [
                "\\begin{tabular}{llr}",
                "\\toprule",
                "Dataset & Model & $d_\\text{model}$ \\\\",
                "\\midrule",
                "\\multirow{2}{*}{C4} & $\\sigma$-MoE & 1,5 \\\\",
                " & A\\_B & -- \\\\",
                "\\midrule",
                "peS2o & a|b & 2$\\times$3 \\\\",
                "\\bottomrule",
                "\\end{tabular}",
            ]
        );
    }

    #[test]
    fn separators_in_cells_do_not_separate() {
        assert_eq!(
            table().csv(),
            "Dataset,Model,d_model,Run\nC4,σ-MoE,\"1,5\",x\nC4,A_B,,y\npeS2o,a|b,2×3,z\n"
        );
        assert_eq!(
            table().markdown(),
            "| Dataset | Model | d_model | Run |\n| --- | --- | --: | --: |\n| C4 | σ-MoE | 1,5 | x |\n\
             | C4 | A_B | – | y |\n| peS2o | a\\|b | 2×3 | z |\n"
        );
    }
}
