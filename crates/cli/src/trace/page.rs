//! The story on one page.

use std::fmt::Write as _;

use super::plot::{self, Axis, COLORS, Part, float, number, text, time};
use super::story::{PROGRESS, Reason, Story};

/// Columns over time.
const BINS: usize = 160;
/// Points of a curve.
const POINTS: usize = 400;

const STYLE: &str = "\
body{font:15px/1.5 system-ui,sans-serif;color:#1b1f24;background:#f4f5f7;margin:0}\
main{max-width:1100px;margin:0 auto;padding:24px}\
h1{font-size:22px;margin:0 0 2px}h2{font-size:17px;margin:0 0 2px}\
p{margin:4px 0 10px;color:#57606a}code{background:#e7eaee;padding:1px 5px;border-radius:4px;color:#1b1f24}\
section{background:#fff;border:1px solid #dfe3e8;border-radius:8px;padding:16px 20px;margin:16px 0}\
.tiles{display:flex;flex-wrap:wrap;gap:10px;margin:14px 0 0}\
.tiles div{background:#fff;border:1px solid #dfe3e8;border-radius:8px;padding:8px 14px;min-width:118px;flex:1}\
.tiles b{display:block;font-size:20px;font-weight:600}.tiles span{color:#57606a;font-size:13px}\
svg{width:100%;height:auto;display:block}\
.axis{font-size:12px;fill:#57606a}.name{font-size:13px;fill:#1b1f24}.inside{font-size:12.5px;fill:#fff;font-weight:600}\
.grid{stroke:#e7eaee}.tick{stroke:#8b949e}.mark{stroke:#8b949e;stroke-dasharray:3 3}\
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:6px 0 8px 0;font-size:13.5px}\
.legend i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px}\
table{border-collapse:collapse;width:100%;font-size:14px;margin-top:8px}\
th{text-align:right;font-weight:600;color:#57606a;border-bottom:1px solid #dfe3e8;padding:3px 8px}\
td{text-align:right;padding:3px 8px;border-bottom:1px solid #f0f2f4;font-variant-numeric:tabular-nums}\
td:first-child,th:first-child{text-align:left}.bad{color:#b42318;font-weight:600}.good{color:#1a7f37}";

/// The page: one file, without scripts and without anything to fetch.
pub(crate) fn html(story: &Story) -> String {
    let axis = axis(story);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>realm trace</title><style>{STYLE}</style></head>\
         <body><main>\n"
    );
    page.push_str(&head(story));
    page.push_str(&stages(story));
    page.push_str(&inside(story, &axis));
    page.push_str(&exits(story, &axis));
    page.push_str(&memory(story, &axis));
    page.push_str(&calls(story));
    page.push_str(&agreement(story));
    page + "</main></body></html>\n"
}

fn axis(story: &Story) -> Axis {
    let marks = story
        .stages
        .iter()
        .filter(|stage| stage.end > story.begin && stage.end < story.end)
        .map(|stage| (stage.end, format!("{} ends", stage.title)))
        .collect();
    Axis { begin: story.begin, end: story.end, marks }
}

fn color(index: usize) -> &'static str {
    COLORS[index % COLORS.len()]
}

fn count(value: usize) -> String {
    number(u64::try_from(value).unwrap_or(u64::MAX))
}

fn section(title: &str, words: &str, body: &str) -> String {
    format!("<section><h2>{}</h2><p>{words}</p>{body}</section>\n", text(title))
}

fn head(story: &Story) -> String {
    let ended = match story.status {
        Some(0) => "status 0".to_owned(),
        Some(status) => format!("status {status}"),
        None => "the recording was cut off".to_owned(),
    };
    let took = |name: &str| {
        let stage = story.stages.iter().find(|stage| stage.name == name);
        stage.map_or_else(|| "–".to_owned(), |stage| time(stage.end - stage.start))
    };
    let ready = story.stages.iter().find(|stage| stage.name == "guest-init");
    let exits: u64 = story.exits.values().sum();
    let calls: u64 = story.rmi.values().map(|(calls, _)| calls).sum();
    let tiles = [
        (
            ready.map_or_else(|| "–".to_owned(), |stage| time(stage.end - story.begin)),
            "start to guest's init",
        ),
        (took("populated"), "populating"),
        (number(calls), "calls of the RMM"),
        (number(exits), "exits of CPUs"),
        (number(story.faults[0]), "memory faults resolved"),
        (number(story.lost), "events lost"),
    ];
    let tiles = tiles.iter().fold(String::new(), |mut out, (value, name)| {
        let class = if *name == "events lost" && story.lost > 0 { " class=\"bad\"" } else { "" };
        let _ = write!(out, "<div><b{class}>{value}</b><span>{name}</span></div>");
        out
    });
    format!(
        "<h1>A Realm's run</h1><p><code>{}</code> · {ended} · times are those of the machine that ran the Realm; on an \
         emulated one, two nanoseconds are an instruction</p><div class=\"tiles\">{tiles}</div>\n",
        text(&story.command)
    )
}

fn stages(story: &Story) -> String {
    let parts: Vec<Part> = story
        .stages
        .iter()
        .enumerate()
        .map(|(index, stage)| Part {
            title: stage.title.to_owned(),
            value: stage.end - stage.start,
            shown: time(stage.end - stage.start),
            color: color(index),
        })
        .collect();
    let mut body = plot::bar("machine", &parts);
    let wall = |stage: &super::story::Stage| {
        stage.wall.map(|wall| u64::try_from(wall.as_nanos()).unwrap_or(u64::MAX))
    };
    if story.stages.iter().any(|stage| stage.wall.is_some()) {
        let real: Vec<Part> = story
            .stages
            .iter()
            .zip(&parts)
            .map(|(stage, part)| {
                let value = wall(stage).unwrap_or(0);
                Part { value, shown: time(value), ..part.clone() }
            })
            .collect();
        body.push_str(&plot::bar("real", &real));
    }
    body.push_str(&plot::legend(&parts));
    body.push_str("<table><tr><th>stage</th><th>from</th><th>took</th><th>share</th><th>real time</th><th>RMI calls</th><th>exits</th></tr>");
    let total = float(parts.iter().map(|part| part.value).sum()).max(1.0);
    for (stage, part) in story.stages.iter().zip(&parts) {
        let (calls, exits) = story.within(stage);
        let _ = write!(
            body,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{:.1} %</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            text(stage.title),
            time(stage.start),
            part.shown,
            100.0 * float(part.value) / total,
            wall(stage).map_or_else(|| "–".to_owned(), time),
            count(calls),
            count(exits)
        );
    }
    body.push_str("</table>");
    section(
        "Where the time went",
        "From the machine's reset, where the firmware tells it, to the end of the Realm. The second bar has the time that \
         passed in the real world.",
        &body,
    )
}

/// How much of each bin lies within each of these spans, summed up by what `which` says.
fn shares(axis: &Axis, spans: impl Iterator<Item = (u64, u64)>) -> Vec<f64> {
    let length = (axis.end.saturating_sub(axis.begin)).max(1);
    let bins = u64::try_from(BINS).unwrap_or(1);
    let width = length.div_ceil(bins).max(1);
    let mut values = vec![0.0; BINS];
    for (start, end) in spans {
        let (mut at, end) = (start.max(axis.begin), end.min(axis.end));
        while at < end {
            let bin = (at - axis.begin) / width;
            let next = (axis.begin + (bin + 1) * width).min(end);
            if let Some(value) = usize::try_from(bin).ok().and_then(|bin| values.get_mut(bin)) {
                *value += float(next - at) / float(width);
            }
            at = next;
        }
    }
    values
}

fn inside(story: &Story, axis: &Axis) -> String {
    let mut cpus: Vec<u32> = story.stays.iter().map(|stay| stay.vcpu).collect();
    cpus.sort_unstable();
    cpus.dedup();
    let many = float(u64::try_from(cpus.len().max(1)).unwrap_or(1));
    let total: u64 = story.stays.iter().map(|stay| stay.end - stay.start).sum();
    let values: Vec<f64> = shares(axis, story.stays.iter().map(|stay| (stay.start, stay.end)))
        .into_iter()
        .map(|share| 100.0 * share / many)
        .collect();
    let legend = plot::legend(&[Part {
        title: "in the Realm".into(),
        value: total,
        shown: time(total),
        color: COLORS[2],
    }]);
    let svg =
        plot::columns("time in the Realm", axis, "% of each CPU's time", &[(COLORS[2], values)], Some(100.0));
    section(
        "How much of it the Realm's CPUs spent inside",
        "The rest is the host kernel, the module, the VMM, what the RMM does for them, and waiting. Dashed lines are the ends of \
         stages.",
        &(svg + &legend),
    )
}

fn exits(story: &Story, axis: &Axis) -> String {
    let length = axis.end.saturating_sub(axis.begin).max(1);
    let bins = u64::try_from(BINS).unwrap_or(1);
    let width = length.div_ceil(bins).max(1);
    let mut series = Vec::new();
    let mut parts = Vec::new();
    for (index, reason) in Reason::ALL.into_iter().enumerate() {
        let Some(total) = story.exits.get(&reason) else { continue };
        let mut values = vec![0.0; BINS];
        for stay in story.stays.iter().filter(|stay| stay.reason == reason) {
            let bin = usize::try_from(stay.end.saturating_sub(axis.begin) / width).unwrap_or(usize::MAX);
            if let Some(value) = values.get_mut(bin) {
                *value += 1.0;
            }
        }
        series.push((color(index), values));
        parts.push(Part {
            title: reason.title().to_owned(),
            value: *total,
            shown: number(*total),
            color: color(index),
        });
    }
    let unit = format!("exits in {}", time(width));
    let svg = plot::columns("exits by reason", axis, &unit, &series, None);
    section(
        "Why CPUs left the Realm",
        "Each exit is two world switches and the host's work.",
        &(svg + &plot::legend(&parts)),
    )
}

fn memory(story: &Story, axis: &Axis) -> String {
    const PAGES_PER_MIB: f64 = 256.0;
    let mut series = Vec::new();
    let mut parts = Vec::new();
    for (index, (function, title)) in PROGRESS.into_iter().enumerate() {
        let points: Vec<(u64, f64)> = story
            .progress(function, POINTS)
            .into_iter()
            .map(|(ns, pages)| (ns, float(pages) / PAGES_PER_MIB))
            .collect();
        let (calls, errors) =
            story.rmi.get(cca_abi::rmi::name(function).unwrap_or("")).copied().unwrap_or_default();
        let pages = calls - errors;
        parts.push(Part {
            title: title.to_owned(),
            value: pages,
            shown: format!("{} pages", number(pages)),
            color: color(index),
        });
        series.push((color(index), points));
    }
    let svg = plot::lines("memory", axis, "MiB", &series);
    section(
        "Memory that went to the Realm, and came back",
        "Successful calls, one for each page (or block, when it is taken back): DATA_CREATE, DATA_CREATE_UNKNOWN, DATA_DESTROY.",
        &(svg + &plot::legend(&parts)),
    )
}

fn calls(story: &Story) -> String {
    let mut rows: Vec<(&str, u64, u64)> =
        story.rmi.iter().map(|(name, (calls, errors))| (*name, *calls, *errors)).collect();
    rows.sort_by_key(|(_, calls, _)| std::cmp::Reverse(*calls));
    let parts: Vec<Part> = rows
        .into_iter()
        .map(|(name, calls, errors)| Part {
            title: name.to_owned(),
            value: calls,
            shown: if errors == 0 {
                number(calls)
            } else {
                format!("{} ({} refused)", number(calls), number(errors))
            },
            color: COLORS[0],
        })
        .collect();
    section(
        "What the host asked of the RMM",
        "Refused calls are no failures: a missing table, for example, is made when the RMM says so.",
        &plot::bars("RMI calls by command", &parts),
    )
}

fn agreement(story: &Story) -> String {
    let wrong: Vec<&super::story::Compared> =
        story.compared.iter().filter(|pair| pair.traced != pair.counted).collect();
    let mut body = String::new();
    if wrong.is_empty() {
        let _ = write!(
            body,
            "<p class=\"good\">All {} numbers agree with the counters that the module keeps by itself.</p>",
            story.compared.len()
        );
    } else {
        body.push_str("<table><tr><th>counter</th><th>in the trace</th><th>counted</th></tr>");
        for pair in wrong {
            let _ = write!(
                body,
                "<tr><td>{}</td><td>{}</td><td class=\"bad\">{}</td></tr>",
                text(&pair.name),
                number(pair.traced),
                number(pair.counted)
            );
        }
        body.push_str("</table>");
    }
    let lost = match story.lost {
        0 => "No event was lost.".to_owned(),
        lost => {
            format!("The kernel had no room for {} events: the plots show less than there was.", number(lost))
        }
    };
    section("Is the trace complete?", &lost, &body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::story::tests::story;

    #[test]
    fn the_page_is_complete_and_fetches_nothing() {
        let page = html(&story());
        assert!(page.ends_with("</html>\n") && page.matches("<section>").count() == 6);
        for outside in ["<script", "http:", "https:", "src=", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert!(page.contains("uname -a &lt;/dev/null") && page.contains("the plots show less"));
        assert!(!page.contains("NaN") && !page.contains("inf"));
    }

    #[test]
    fn time_is_divided_among_bins() {
        let axis = Axis { begin: 100, end: 100 + 1600, marks: vec![] };
        let values = shares(&axis, [(95, 105), (115, 135)].into_iter());
        assert_eq!(values[..5], [0.5, 0.5, 1.0, 0.5, 0.0]);
    }
}
