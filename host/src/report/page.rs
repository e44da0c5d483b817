//! The page itself. Tables are made here, so that they are there without scripts; curves are drawn by `page.js`.

use super::curve::{Curve, N_BUCKETS, Point, Points};
use super::metrics::Knots;
use super::run::Run;
use super::settings::{Value, Values, differences};
use crate::run_folder::machine;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

/// By which a page is known as one of ours.
pub(super) const MARK: &str = "<meta name=\"generator\" content=\"moeut-host report\">";

/// Buckets of all curves together: what a browser opens without a pause.
const MAX_BUCKETS: usize = 400_000;
/// The fewest buckets of a curve.
const MIN_BUCKETS: usize = 32;
/// Groups whose curves are drawn as finely as they are known.
const MAIN_GROUPS: [&str; 2] = ["train/", "validation/"];
/// Bytes of all charts together.
const MAX_CHART_BYTES: usize = 64 << 20;

/// The page, and what is on it.
pub(super) struct Page {
    pub(super) html: String,
    pub(super) n_metrics: usize,
    pub(super) n_charts: usize,
}

/// What the script reads.
#[derive(Serialize)]
struct Data<'a> {
    runs: Vec<RunData<'a>>,
    metrics: Vec<MetricData<'a>>,
}

#[derive(Serialize)]
struct RunData<'a> {
    name: &'a str,
    knots: Knots,
}

#[derive(Serialize)]
struct MetricData<'a> {
    name: &'a str,
    curves: Vec<CurveData>,
}

#[derive(Serialize)]
struct CurveData {
    #[serde(rename = "r")]
    run: usize,
    #[serde(flatten)]
    points: Points,
}

/// How finely curves are drawn.
#[derive(Debug, Clone, Copy)]
struct Detail {
    /// Buckets of a curve that is not of [`MAIN_GROUPS`].
    n_buckets: usize,
}

impl Detail {
    /// As finely as the page may be large.
    fn for_runs(runs: &[Run]) -> Self {
        let curves = || runs.iter().flat_map(|run| run.metrics.curves.values());
        let size = |n: usize| curves().map(|curve| curve.n_points(n)).sum::<usize>();
        let mut n_buckets = N_BUCKETS;
        while n_buckets > MIN_BUCKETS && size(n_buckets) > MAX_BUCKETS {
            n_buckets /= 2;
        }
        Self { n_buckets }
    }

    fn n_buckets(self, name: &str) -> usize {
        let is_main = MAIN_GROUPS.iter().any(|group| name.starts_with(group));
        if is_main { N_BUCKETS } else { self.n_buckets }
    }
}

/// Makes the page of runs, with their arguments in the same order.
pub(super) fn render(runs: &[Run], values: &[Values], remarks: &[String]) -> Page {
    let detail = Detail::for_runs(runs);
    let names: BTreeSet<&str> = runs
        .iter()
        .flat_map(|run| run.metrics.curves.keys().map(String::as_str))
        .collect();
    let mut remarks = remarks.to_vec();
    let (charts, n_charts) = charts(runs, &mut remarks);
    let sections = [
        ("runs", "Runs", run_table(runs, &remarks)),
        ("results", "Results", results(runs, &names)),
        ("curves", "Curves", curve_tools(runs, detail)),
        ("charts", "Charts", charts),
        (
            "configuration",
            "Configuration",
            configuration(runs, values),
        ),
        ("environment", "Environment", environment(runs)),
        ("texts", "Texts", texts(runs)),
    ];
    let mut html = head(runs);
    html.push_str("<nav aria-label=\"Sections\">");
    for (id, title, content) in &sections {
        if !content.is_empty() {
            let _ = write!(html, "<a href=\"#{id}\">{title}</a>");
        }
    }
    html.push_str("</nav>\n<main>\n");
    for (id, title, content) in &sections {
        if !content.is_empty() {
            let _ = write!(
                html,
                "<section id=\"{id}\" aria-labelledby=\"{id}-title\">\n<h2 id=\"{id}-title\">{title}</h2>\n{content}</section>\n"
            );
        }
    }
    html.push_str("</main>\n<script type=\"application/json\" id=\"data\">");
    html.push_str(&data(runs, &names, detail));
    html.push_str("</script>\n<script>\n");
    html.push_str(include_str!("page.js"));
    html.push_str("</script>\n</body>\n</html>\n");
    Page {
        html,
        n_metrics: names.len(),
        n_charts,
    }
}

fn head(runs: &[Run]) -> String {
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    let title = match names[..] {
        [a] => a.to_owned(),
        [a, b] => format!("{a}, {b}"),
        [a, b, ..] => format!("{a}, {b} and {} more", names.len() - 2),
        [] => String::new(),
    };
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let seconds = now.as_secs();
    let css = include_str!("page.css");
    let machine = escape(&machine());
    let title = escape(&title);
    let runs = counted(runs.len(), "run");
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n{MARK}\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; \
         style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n\
         <link rel=\"icon\" href=\"data:,\">\n<title>{title}</title>\n<style>\n{css}</style>\n</head>\n<body>\n\
         <header><h1>{title}</h1>\n<p class=\"quiet\">{runs}; written on {machine}, \
         <time data-seconds=\"{seconds}\">{seconds} s after 1970</time></p></header>\n"
    )
}

/// `<` cannot begin a tag inside of JSON: it is only in texts, where it may be written as its number.
fn data(runs: &[Run], names: &BTreeSet<&str>, detail: Detail) -> String {
    let curves = |name: &str| {
        let of_runs = runs.iter().enumerate();
        let curve = |(run, of_run): (usize, &Run)| {
            let curve = of_run.metrics.curves.get(name)?;
            let points = curve.points(detail.n_buckets(name));
            Some(CurveData { run, points })
        };
        of_runs.filter_map(curve).collect()
    };
    let data = Data {
        runs: runs
            .iter()
            .map(|run| RunData {
                name: &run.name,
                knots: run.metrics.knots(),
            })
            .collect(),
        metrics: names
            .iter()
            .map(|name| MetricData {
                name,
                curves: curves(name),
            })
            .collect(),
    };
    // Texts and finite numbers are always JSON.
    let json = serde_json::to_string(&data).unwrap_or_default();
    json.replace('<', "\\u003c")
}

fn run_table(runs: &[Run], remarks: &[String]) -> String {
    let mut text = String::from(
        "<div class=\"scroll\"><table>\n<thead><tr><th>run</th><th>reached</th><th>last row</th><th>rows</th>\
         <th>starts</th><th>folder</th></tr></thead>\n<tbody>\n",
    );
    for (index, run) in runs.iter().enumerate() {
        let last = run.metrics.last_time.map_or_else(
            || "–".to_owned(),
            |time| format!("<time data-seconds=\"{time}\">{time:.0} s after 1970</time>"),
        );
        let _ = writeln!(
            text,
            "<tr><th data-run=\"{index}\">{}</th><td>{}</td><td>{last}</td><td class=\"number\">{}</td>\
             <td class=\"number\">{}</td><td class=\"mono\">{}</td></tr>",
            escape(&run.name),
            escape(&run.state()),
            run.metrics.n_rows,
            run.starts.len(),
            escape(&run.folder.display().to_string()),
        );
    }
    text.push_str("</tbody></table></div>\n");
    if !remarks.is_empty() {
        text.push_str("<h3>Remarks</h3>\n<ul id=\"remarks\">\n");
        for remark in remarks {
            let _ = writeln!(text, "<li>{}</li>", marked(remark));
        }
        text.push_str("</ul>\n");
    }
    text
}

/// Which values of a metric are good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Good {
    Low,
    High,
    Neither,
}

impl Good {
    /// By the words in a metric's name.
    fn of(name: &str) -> Self {
        let has = |words: &[&str]| words.iter().any(|word| name.contains(word));
        if has(&["accuracy", "tokens_per_s", "mfu"]) {
            Self::High
        } else if has(&["loss", "perplexity", "bits_per_byte", "timing/"]) && !has(&["time_since"])
        {
            Self::Low
        } else {
            Self::Neither
        }
    }

    fn best(self, curve: &Curve) -> Option<Point> {
        match self {
            Self::Low => curve.range.map(|(low, _)| low),
            Self::High => curve.range.map(|(_, high)| high),
            Self::Neither => None,
        }
    }
}

/// Final and best values: those of validations and the loss at once, all others on demand.
fn results(runs: &[Run], names: &BTreeSet<&str>) -> String {
    let is_main = |name: &&&str| {
        let is_score = name.starts_with("validation/") || name.starts_with("load_validation/");
        (is_score && !name.contains("time_since")) || **name == "train/loss"
    };
    let (main, other): (Vec<&str>, Vec<&str>) = names.iter().partition(is_main);
    let mut text = String::new();
    if !main.is_empty() {
        text.push_str(&result_table(runs, &main));
    }
    if !other.is_empty() {
        let _ = write!(
            text,
            "<details><summary>{}</summary>\n{}</details>\n",
            counted(other.len(), "other metric"),
            result_table(runs, &other)
        );
    }
    text
}

fn result_table(runs: &[Run], names: &[&str]) -> String {
    let mut text =
        String::from("<div class=\"scroll\"><table>\n<thead><tr><th>last value, and the best</th>");
    text.push_str(&run_headings(runs));
    text.push_str("</tr></thead>\n<tbody>\n");
    for name in names {
        let good = Good::of(name);
        let curves: Vec<Option<&Curve>> = runs
            .iter()
            .map(|run| run.metrics.curves.get(*name))
            .collect();
        let bests = curves.iter().flatten().filter_map(|curve| good.best(curve));
        let ordered = bests.map(|point| point.value);
        let top = match good {
            Good::High => ordered.reduce(f64::max),
            Good::Low | Good::Neither => ordered.reduce(f64::min),
        };
        let _ = write!(text, "<tr><th>{}</th>", escape(name));
        for curve in &curves {
            text.push_str(&result_cell(*curve, good, top.filter(|_| runs.len() > 1)));
        }
        text.push_str("</tr>\n");
    }
    text.push_str("</tbody></table></div>\n");
    text
}

fn result_cell(curve: Option<&Curve>, good: Good, top: Option<f64>) -> String {
    let Some(curve) = curve else {
        return "<td class=\"quiet\">–</td>".to_owned();
    };
    let Some(last) = curve.last else {
        return "<td class=\"quiet\">no number</td>".to_owned();
    };
    let best = good.best(curve);
    let is_top = best.is_some_and(|best| Some(best.value) == top);
    let class = if is_top { "number top" } else { "number" };
    let at = |point: Point| format!("{} @ {}", number(point.value), point.step);
    let best = best.filter(|best| best.step != last.step);
    let best = best.map(|best| format!("<br><span class=\"quiet\">{}</span>", at(best)));
    format!(
        "<td class=\"{class}\">{}{}</td>",
        at(last),
        best.unwrap_or_default()
    )
}

fn run_headings(runs: &[Run]) -> String {
    let heading = |(index, run): (usize, &Run)| {
        format!("<th data-run=\"{index}\">{}</th>", escape(&run.name))
    };
    runs.iter().enumerate().map(heading).collect()
}

/// The controls above the curves, and where the script puts them.
fn curve_tools(runs: &[Run], detail: Detail) -> String {
    let all = || runs.iter().flat_map(|run| &run.metrics.curves);
    if all().next().is_none() {
        return String::new();
    }
    let is_cut = |(name, curve): &(&String, &Curve)| !curve.is_whole(detail.n_buckets(name));
    let note = match all().filter(is_cut).count() {
        0 => "Every value is drawn.".to_owned(),
        n => format!(
            "{n} of {} are too long to be drawn value by value: of each of at most {} parts of such a curve ({N_BUCKETS} \
             in train and validation) the mean is drawn, and behind it the range from the lowest to the highest value.",
            counted(all().count(), "curve"),
            detail.n_buckets
        ),
    };
    format!(
        "<p class=\"quiet\">{note} Drag to zoom, double-click for all; with the keyboard: arrows, + and −, Escape. \
         A gap is a value that is NaN or infinite.</p>\n\
         <noscript><p>Curves need JavaScript; the tables do not.</p></noscript>\n\
         <div id=\"tools\" role=\"toolbar\" aria-label=\"What the curves show\">\n\
         <label>Search <input type=\"search\" id=\"search\" placeholder=\"loss val …\"></label>\n\
         <span class=\"quiet\" id=\"found\" role=\"status\"></span>\n\
         <label>X <select id=\"x\"><option value=\"step\">step</option><option value=\"tokens\">tokens</option>\
         <option value=\"time\">time</option></select></label>\n\
         <label>Smoothing <input type=\"range\" id=\"smoothing\" min=\"0\" max=\"0.99\" step=\"0.01\" value=\"0\">\
         <output id=\"smoothed\" for=\"smoothing\">0.00</output></label>\n\
         <label><input type=\"checkbox\" id=\"log\"> logarithmic</label>\n\
         <div id=\"legend\" role=\"group\" aria-label=\"Runs\"></div>\n</div>\n<div id=\"groups\"></div>\n"
    )
}

/// Charts of one name side by side, by the first part of their names; and how many there are.
fn charts(runs: &[Run], remarks: &mut Vec<String>) -> (String, usize) {
    let mut groups: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for name in runs.iter().flat_map(|run| run.charts.keys()) {
        let group = name.split_once('/').map_or("other", |(group, _)| group);
        groups.entry(group).or_default().insert(name);
    }
    let n_names: usize = groups.values().map(BTreeSet::len).sum();
    let (mut text, mut n_charts, mut n_left_out) = (String::new(), 0, 0);
    for (group, names) in groups {
        let open = if n_names <= 12 { " open" } else { "" };
        let _ = writeln!(
            text,
            "<details{open}><summary><h3>{}</h3> <span class=\"quiet\">{}</span></summary>",
            escape(group),
            names.len()
        );
        for name in names {
            let _ = write!(text, "<h3>{}</h3>\n<div class=\"grid\">\n", escape(name));
            for (index, run) in runs.iter().enumerate() {
                let Some(chart) = run.charts.get(name) else {
                    continue;
                };
                if text.len() > MAX_CHART_BYTES {
                    n_left_out += 1;
                    continue;
                }
                n_charts += 1;
                let title = format!("{name}, {}, step {}", run.name, chart.step);
                let _ = writeln!(
                    text,
                    "<figure><figcaption><span class=\"name\" data-run=\"{index}\">{}</span>\
                     <span class=\"quiet\">step {}</span></figcaption>\
                     <img alt=\"{}\" src=\"{}\"></figure>",
                    escape(&run.name),
                    chart.step,
                    escape(&title),
                    data_url(&chart.plot.to_svg(name)),
                );
            }
            text.push_str("</div>\n");
        }
        text.push_str("</details>\n");
    }
    if n_left_out > 0 {
        remarks.push(format!(
            "{n_left_out} charts are left out, because the page would become too large: name fewer runs"
        ));
    }
    (text, n_charts)
}

/// As a picture, so that names and styles inside of it are its own.
fn data_url(svg: &str) -> String {
    let mut url = String::with_capacity(svg.len() * 5 / 4 + 32);
    url.push_str("data:image/svg+xml;charset=utf-8,");
    for c in svg.chars() {
        match c {
            '%' | '#' | '<' | '>' | '"' | '&' | '\n' => {
                let _ = write!(url, "%{:02X}", c as u32);
            }
            c => url.push(c),
        }
    }
    url
}

fn configuration(runs: &[Run], values: &[Values]) -> String {
    let mut text = String::new();
    let differences = differences(values);
    if runs.len() > 1 {
        if differences.is_empty() {
            text.push_str("<p>All runs have the same arguments.</p>\n");
        } else {
            text.push_str(
                "<p class=\"quiet\">Arguments that differ; defaults are in brackets.</p>\n",
            );
            text.push_str(
                "<div class=\"scroll\"><table id=\"differences\">\n<thead><tr><th>argument</th>",
            );
            text.push_str(&run_headings(runs));
            text.push_str("</tr></thead>\n<tbody>\n");
            for (name, row) in differences {
                let _ = write!(text, "<tr><th>-{}</th>", escape(name));
                for value in row {
                    let _ = write!(text, "<td>{}</td>", setting(value));
                }
                text.push_str("</tr>\n");
            }
            text.push_str("</tbody></table></div>\n");
        }
    }
    for (run, values) in runs.iter().zip(values) {
        let mut lines = String::new();
        let (typed, defaults): (Vec<_>, Vec<_>) =
            values.iter().partition(|(_, value)| !value.is_default);
        for (name, value) in typed.into_iter().chain(defaults) {
            let _ = writeln!(lines, "-{} {}", escape(name), setting(Some(value)));
        }
        let _ = writeln!(
            text,
            "<details><summary>all arguments of {}</summary><pre>{lines}</pre></details>",
            escape(&run.name)
        );
    }
    text
}

fn setting(value: Option<&Value>) -> String {
    let Some(value) = value else {
        return "<span class=\"quiet\">–</span>".to_owned();
    };
    let text = if value.text.is_empty() {
        "\"\"".to_owned()
    } else {
        escape(&value.text)
    };
    if value.is_default {
        format!("<span class=\"quiet\">({text})</span>")
    } else {
        text
    }
}

/// The newest start of each run, in which lines are marked that are not those of every other run.
fn environment(runs: &[Run]) -> String {
    let newest = |run: &Run| run.starts.last().cloned();
    let known: Vec<(&Run, String)> = runs
        .iter()
        .filter_map(|run| Some((run, newest(run)?)))
        .collect();
    // Each start has its own time and command.
    let is_compared = |line: &str| !line.starts_with("start ") && !line.starts_with("command ");
    let is_common = |wanted: &str| {
        let has_it = |(_, start): &(&Run, String)| start.lines().any(|line| line == wanted);
        known.iter().all(has_it)
    };
    let (mut text, mut n_marked) = (String::new(), 0);
    for (run, start) in &known {
        let mut lines = String::new();
        for line in start.lines() {
            let escaped = escape(line);
            if is_compared(line) && !is_common(line) {
                n_marked += 1;
                let _ = writeln!(lines, "<mark>{escaped}</mark>");
            } else {
                let _ = writeln!(lines, "{escaped}");
            }
        }
        let (name, n_starts) = (escape(&run.name), counted(run.starts.len(), "start"));
        let _ = writeln!(
            text,
            "<details><summary>{name}, {n_starts}, the last one</summary><pre>{lines}</pre></details>"
        );
    }
    if known.len() > 1 {
        text.push_str(match n_marked {
            0 => "<p>Program, machine, variables and plugins were the same for all of them.</p>\n",
            _ => "<p class=\"quiet\">Marked lines are not those of all runs.</p>\n",
        });
    }
    text
}

/// The newest text of each name.
fn texts(runs: &[Run]) -> String {
    let mut text = String::new();
    for run in runs.iter().filter(|run| !run.metrics.texts.is_empty()) {
        let _ = writeln!(text, "<details><summary>{}</summary>", escape(&run.name));
        for (name, (step, content)) in &run.metrics.texts {
            let (name, content) = (escape(name), escape(content));
            let _ = write!(text, "<h3>{name}, step {step}</h3>\n<pre>{content}</pre>\n");
        }
        text.push_str("</details>\n");
    }
    text
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // HTML has no place for other control characters.
            c if c.is_control() && !matches!(c, '\n' | '\t') => {
                escaped.push(char::REPLACEMENT_CHARACTER);
            }
            c => escaped.push(c),
        }
    }
    escaped
}

/// With what stands in backticks as code.
fn marked(text: &str) -> String {
    let parts = text.split('`').enumerate();
    let parts = parts.map(|(index, part)| match index % 2 {
        0 => escape(part),
        _ => format!("<code>{}</code>", escape(part)),
    });
    parts.collect()
}

/// Five digits, as in the curves.
fn number(value: f64) -> String {
    let size = value.abs();
    if size != 0.0 && !(1e-3..1e7).contains(&size) {
        return format!("{value:.3e}");
    }
    let n_whole = (1..7).take_while(|&n| size >= 10_f64.powi(n)).count();
    let text = format!("{value:.*}", 4_usize.saturating_sub(n_whole));
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

fn counted(n: usize, what: &str) -> String {
    let s = if n == 1 { "" } else { "s" };
    format!("{n} {what}{s}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_others_are_no_tags() {
        assert_eq!(
            escape("<a href='x'>&\"\u{1b}"),
            "&lt;a href=&#39;x&#39;&gt;&amp;&quot;\u{fffd}"
        );
        assert_eq!(
            marked("`<b>` is `c`, d"),
            "<code>&lt;b&gt;</code> is <code>c</code>, d"
        );
        assert_eq!(
            data_url("<svg a=\"#1\">5 % é</svg>"),
            "data:image/svg+xml;charset=utf-8,%3Csvg a=%22%231%22%3E5 %25 é%3C/svg%3E"
        );
    }

    #[test]
    fn numbers_have_five_digits() {
        for (value, text) in [
            (0.0, "0"),
            (2.345_678, "2.3457"),
            (2.5, "2.5"),
            (123.456_7, "123.46"),
            (1_234_567.0, "1234567"),
            (12_345.67, "12346"),
            (0.012_345, "0.0123"),
            (1.5e-4, "1.500e-4"),
            (-3.25e9, "-3.250e9"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn names_tell_which_values_are_good() {
        for (name, good) in [
            ("train/loss", Good::Low),
            ("validation/val/accuracy", Good::High),
            ("validation/val/time_since_best_loss", Good::Neither),
            ("timing/tokens_per_s", Good::High),
            ("timing/ms_per_iter", Good::Low),
            ("lr", Good::Neither),
        ] {
            assert_eq!(Good::of(name), good, "{name}");
        }
    }
}
