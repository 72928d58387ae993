//! Plots as SVG, without any script: a bar in parts, stacked columns over time, curves over time, bars with names.

use std::fmt::Write as _;

/// The width of every plot; those over time have their axes one below the other.
const WIDTH: f64 = 1040.0;
/// Room for the numbers of the vertical axis.
const LEFT: f64 = 64.0;
/// Room for the end of the last label.
const RIGHT: f64 = 16.0;
/// The height of what is drawn over time, and of what is above and below it.
const HEIGHT: f64 = 190.0;
const ABOVE: f64 = 22.0;
const BELOW: f64 = 34.0;

/// Colours that can be told apart, by people who see few of them too.
pub(crate) const COLORS: [&str; 10] = [
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d31", "#7a5195", "#b8b000",
    "#7f7f7f",
];

/// Text within HTML.
pub(crate) fn text(raw: &str) -> String {
    raw.chars().fold(String::with_capacity(raw.len()), |mut out, c| {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
        out
    })
}

/// A time as people read it.
pub(crate) fn time(ns: u64) -> String {
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.1} µs", float(ns) / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", float(ns) / 1e6),
        _ => format!("{:.2} s", float(ns) / 1e9),
    }
}

/// A number with its thousands apart.
pub(crate) fn number(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

/// What a plot takes: precision of a pixel is enough.
#[allow(clippy::cast_precision_loss, reason = "plots have a thousand pixels")]
pub(crate) fn float(value: u64) -> f64 {
    value as f64
}

/// A part of a bar, or a curve's or a column's colour in a legend.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    /// Its name.
    pub(crate) title: String,
    /// How large it is.
    pub(crate) value: u64,
    /// That, as people read it.
    pub(crate) shown: String,
    /// Its colour.
    pub(crate) color: &'static str,
}

/// What stands for what.
pub(crate) fn legend(parts: &[Part]) -> String {
    let items = parts.iter().fold(String::new(), |mut out, part| {
        let _ = write!(
            out,
            "<span><i style=\"background:{}\"></i>{} <b>{}</b></span>",
            part.color,
            text(&part.title),
            text(&part.shown)
        );
        out
    });
    format!("<div class=\"legend\">{items}</div>")
}

/// One bar in parts; each has its name where there is room.
pub(crate) fn bar(label: &str, parts: &[Part]) -> String {
    let total = float(parts.iter().map(|part| part.value).sum()).max(1.0);
    let width = WIDTH - LEFT - RIGHT;
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} 42\" role=\"img\" aria-label=\"{}\">", text(label));
    let _ = write!(
        svg,
        "<text x=\"{}\" y=\"25\" class=\"axis\" text-anchor=\"end\">{}</text>",
        LEFT - 8.0,
        text(label)
    );
    let mut x = LEFT;
    for part in parts {
        let wide = width * float(part.value) / total;
        let _ = write!(
            svg,
            "<rect x=\"{x:.1}\" y=\"4\" width=\"{:.1}\" height=\"34\" fill=\"{}\"><title>{}: {}</title></rect>",
            wide.max(0.5),
            part.color,
            text(&part.title),
            text(&part.shown)
        );
        // A letter is seven pixels wide.
        let fits = |words: &str| float(u64::try_from(words.chars().count()).unwrap_or(0)) * 7.0 + 8.0 < wide;
        let both = format!("{} {}", part.title, part.shown);
        let words = if fits(&both) {
            both
        } else if fits(&part.shown) {
            part.shown.clone()
        } else {
            String::new()
        };
        let _ = write!(svg, "<text x=\"{:.1}\" y=\"26\" class=\"inside\">{}</text>", x + 5.0, text(&words));
        x += wide;
    }
    svg + "</svg>"
}

/// A range of time, and moments in it that are marked.
#[derive(Debug, Clone)]
pub(crate) struct Axis {
    /// From.
    pub(crate) begin: u64,
    /// To.
    pub(crate) end: u64,
    /// Moments and what happened then.
    pub(crate) marks: Vec<(u64, String)>,
}

impl Axis {
    fn x(&self, ns: u64) -> f64 {
        let length = float(self.end.saturating_sub(self.begin)).max(1.0);
        let at = float(ns.clamp(self.begin, self.end.max(self.begin)) - self.begin);
        LEFT + (WIDTH - LEFT - RIGHT) * at / length
    }

    /// The frame of a plot up to `top`: both axes, the marks, and what `unit` is.
    fn frame(&self, label: &str, top: f64, unit: &str) -> String {
        let total = ABOVE + HEIGHT + BELOW;
        let mut svg =
            format!("<svg viewBox=\"0 0 {WIDTH} {total}\" role=\"img\" aria-label=\"{}\">", text(label));
        let step = nice(top / 5.0);
        let mut value = 0.0;
        while value <= top * 1.001 {
            let y = y(value, top);
            let _ = write!(
                svg,
                "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\" class=\"grid\"/>\
                 <text x=\"{}\" y=\"{:.1}\" class=\"axis\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 8.0,
                y + 4.0,
                short(value)
            );
            value += step;
        }
        let _ = write!(svg, "<text x=\"{LEFT}\" y=\"12\" class=\"axis\">{}</text>", text(unit));
        let seconds = float(self.end.saturating_sub(self.begin)) / 1e9;
        let step = nice(seconds / 8.0);
        let first = (float(self.begin) / 1e9 / step).ceil() * step;
        let mut at = first;
        while at <= float(self.end) / 1e9 {
            let x = LEFT + (WIDTH - LEFT - RIGHT) * (at - float(self.begin) / 1e9) / seconds.max(1e-9);
            let bottom = ABOVE + HEIGHT;
            let _ = write!(
                svg,
                "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{bottom}\" y2=\"{}\" class=\"tick\"/>\
                 <text x=\"{x:.1}\" y=\"{}\" class=\"axis\" text-anchor=\"middle\">{} s</text>",
                bottom + 5.0,
                bottom + 20.0,
                trimmed(at)
            );
            at += step;
        }
        for (ns, title) in &self.marks {
            let x = self.x(*ns);
            let _ = write!(
                svg,
                "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{ABOVE}\" y2=\"{}\" class=\"mark\"><title>{}</title></line>",
                ABOVE + HEIGHT,
                text(title)
            );
        }
        svg
    }
}

fn y(value: f64, top: f64) -> f64 {
    ABOVE + HEIGHT * (1.0 - value / top.max(1e-9))
}

/// 1, 2 or 5 times a power of ten, not below `step`.
fn nice(step: f64) -> f64 {
    if !(step > 0.0 && step.is_finite()) {
        return 1.0;
    }
    let power = 10f64.powf(step.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .iter()
        .map(|factor| factor * power)
        .find(|nice| *nice >= step * 0.999)
        .unwrap_or(power)
}

/// A number on an axis.
fn short(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{} M", trimmed(value / 1e6)),
        value if value >= 1e3 => format!("{} k", trimmed(value / 1e3)),
        value => trimmed(value),
    }
}

fn trimmed(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Columns over time, stacked; each series has a value for each of as many bins.
pub(crate) fn columns(
    label: &str,
    axis: &Axis,
    unit: &str,
    series: &[(&'static str, Vec<f64>)],
    top: Option<f64>,
) -> String {
    let bins = series.iter().map(|(_, values)| values.len()).max().unwrap_or(0);
    let sum = |bin: usize| series.iter().filter_map(|(_, values)| values.get(bin)).sum::<f64>();
    let top = top.unwrap_or_else(|| (0..bins).map(sum).fold(0.0, f64::max) * 1.05).max(1e-9);
    let mut svg = axis.frame(label, top, unit);
    let wide = (WIDTH - LEFT - RIGHT) / float(u64::try_from(bins.max(1)).unwrap_or(1));
    for bin in 0..bins {
        let x = LEFT + wide * float(u64::try_from(bin).unwrap_or(0));
        let mut below = 0.0;
        for (color, values) in series {
            let value = values.get(bin).copied().unwrap_or(0.0);
            if value > 0.0 {
                let high = HEIGHT * value / top;
                let _ = write!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{high:.2}\" fill=\"{color}\"/>",
                    y(below + value, top),
                    wide + 0.2
                );
                below += value;
            }
        }
    }
    svg + "</svg>"
}

/// Curves over time.
pub(crate) fn lines(
    label: &str,
    axis: &Axis,
    unit: &str,
    series: &[(&'static str, Vec<(u64, f64)>)],
) -> String {
    let top =
        series.iter().flat_map(|(_, points)| points).map(|(_, value)| *value).fold(0.0, f64::max) * 1.08;
    let top = top.max(1e-9);
    let mut svg = axis.frame(label, top, unit);
    for (color, points) in series.iter().filter(|(_, points)| !points.is_empty()) {
        let path: String = points.iter().enumerate().fold(String::new(), |mut path, (index, (ns, value))| {
            let _ = write!(
                path,
                "{}{:.1} {:.1}",
                if index == 0 { "M" } else { "L" },
                axis.x(*ns),
                y(*value, top)
            );
            path
        });
        // What was reached stays.
        let last = points.last().map_or(0.0, |(_, value)| *value);
        let end = format!("L{:.1} {:.1}", axis.x(axis.end), y(last, top));
        let _ =
            write!(svg, "<path d=\"{path}{end}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"2.2\"/>");
    }
    svg + "</svg>"
}

/// Bars with names and numbers, one below the other.
pub(crate) fn bars(label: &str, parts: &[Part]) -> String {
    const ROW: f64 = 24.0;
    const NAMES: f64 = 230.0;
    const NUMBERS: f64 = 230.0;
    let top = float(parts.iter().map(|part| part.value).max().unwrap_or(0)).max(1.0);
    let total = ROW * float(u64::try_from(parts.len()).unwrap_or(0)) + 4.0;
    let mut svg =
        format!("<svg viewBox=\"0 0 {WIDTH} {total}\" role=\"img\" aria-label=\"{}\">", text(label));
    for (part, row) in parts.iter().zip(0u64..) {
        let y = ROW * float(row);
        let wide = (WIDTH - NAMES - NUMBERS) * float(part.value) / top;
        let _ = write!(
            svg,
            "<text x=\"{}\" y=\"{:.1}\" class=\"name\" text-anchor=\"end\">{}</text>\
             <rect x=\"{NAMES}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{}\" fill=\"{}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" class=\"name\">{}</text>",
            NAMES - 10.0,
            y + 16.0,
            text(&part.title),
            y + 3.0,
            wide.max(1.0),
            ROW - 6.0,
            part.color,
            NAMES + wide + 8.0,
            y + 16.0,
            text(&part.shown)
        );
    }
    svg + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!(number(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!(number(12), "12");
        assert_eq!(time(1_500), "1.5 µs");
        assert_eq!(time(12_345_678_901), "12.35 s");
        assert_eq!(short(2500.0), "2.5 k");
    }

    #[test]
    fn steps_are_round_and_there_are_few() {
        for (step, expected) in
            [(0.7, 1.0), (1.3, 2.0), (37.0, 50.0), (0.0, 1.0), (f64::NAN, 1.0), (0.02, 0.02)]
        {
            assert!((nice(step) - expected).abs() < 1e-9, "{step}");
        }
    }

    #[test]
    fn words_of_others_cannot_become_markup() {
        let part = Part { title: "<script>".into(), value: 1, shown: "\"&".into(), color: COLORS[0] };
        let parts = [part];
        for svg in [bar("<b>", &parts), bars("x", &parts), legend(&parts)] {
            assert!(
                !svg.contains("<script>") && !svg.contains("<b>\"") && svg.contains("&quot;&amp;"),
                "{svg}"
            );
        }
    }

    #[test]
    fn nothing_to_plot_is_no_reason_to_fail() {
        let axis = Axis { begin: 5, end: 5, marks: vec![] };
        for svg in
            [columns("a", &axis, "", &[], None), lines("a", &axis, "", &[("#000", vec![])]), bar("a", &[])]
        {
            assert!(svg.starts_with("<svg") && svg.ends_with("</svg>") && !svg.contains("NaN"), "{svg}");
        }
    }
}
