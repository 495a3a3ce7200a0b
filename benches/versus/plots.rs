//! SVG plots, drawn from the JSON alone: an old run can be drawn again.
//!
//! Bars and points are medians over the rounds, whiskers reach from the least to the greatest
//! round. The colours are those of Okabe and Ito, told apart by people with any colour vision.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde_json::Value;

use super::statistics::spread;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const WIDTH: u32 = 960;
const PANEL_HEIGHT: u32 = 380;
const LEGEND_HEIGHT: u32 = 34;
const TITLE_HEIGHT: u32 = 40;
const FONT: &str = "DejaVu Sans, sans-serif";

const COLOURS: [RGBColor; 8] = [
    RGBColor(90, 90, 90),
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
    RGBColor(86, 180, 233),
    RGBColor(240, 228, 66),
];

/// One group of bars: a workload's figure.
struct Group {
    label: &'static str,
    workload: &'static str,
    figure: &'static str,
}

const fn group(label: &'static str, workload: &'static str, figure: &'static str) -> Group {
    Group { label, workload, figure }
}

/// A panel of grouped bars.
struct Bars {
    title: &'static str,
    unit: &'static str,
    groups: &'static [Group],
}

/// A panel of lines.
struct Lines {
    title: &'static str,
    across: &'static str,
    up: &'static str,
    logarithmic: bool,
    /// Show where nothing would be lost.
    diagonal: bool,
    lines: Vec<(usize, Vec<(f64, f64)>)>,
}

/// Draws all plots a report has the data for; the names of the files.
pub fn draw(report: &Value, folder: &Path) -> Result<Vec<String>> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let report = Report::new(report)?;
    let mut drawn = Vec::new();
    let bars: [(&str, &str, &[Bars]); 4] = [
        ("frame-rate.svg", "Frames per second by frame size", FRAME_RATE),
        ("lossless.svg", "Throughput at no more than 0.1 % loss, by frame size", LOSSLESS),
        ("tcp.svg", "TCP between real network stacks", TCP),
        ("cost.svg", "Processor time of the whole machine", COST),
    ];
    for (file, title, panels) in bars {
        let panels: Vec<&Bars> = panels.iter().filter(|panel| report.has(panel)).collect();
        if !panels.is_empty() {
            let path = folder.join(file);
            report.page(&path, title, panels.len(), |area, index| match panels.get(index) {
                Some(panel) => report.bars(area, panel),
                None => Ok(()),
            })?;
            drawn.push(file.into());
        }
    }
    let lines = [
        (
            "overload.svg",
            "Delivered under overload, 60 byte frames (dashed: nothing lost)",
            report.overload(),
        ),
        (
            "round-trip.svg",
            "Round-trip time from a guest, by share of the echoes",
            report.round_trips(),
        ),
        ("ports.svg", "Many mapped ports, traffic on one, 60 byte frames", report.ports()),
    ];
    for (file, title, panels) in lines {
        let panels: Vec<Lines> =
            panels.into_iter().filter(|panel| !panel.lines.is_empty()).collect();
        if !panels.is_empty() {
            let path = folder.join(file);
            report.page(&path, title, panels.len(), |area, index| match panels.get(index) {
                Some(panel) => lines_panel(area, panel),
                None => Ok(()),
            })?;
            drawn.push(file.into());
        }
    }
    Ok(drawn)
}

const FRAME_RATE: &[Bars] = &[
    Bars {
        title: "guest to wire",
        unit: "million frames/s",
        groups: &[
            group("60 bytes", "flood-guest-to-wire-60", "delivered_mpps"),
            group("512 bytes", "flood-guest-to-wire-512", "delivered_mpps"),
            group("1514 bytes", "flood-guest-to-wire-1514", "delivered_mpps"),
        ],
    },
    Bars {
        title: "wire to guest (flooded: what arrives)",
        unit: "million frames/s",
        groups: &[
            group("60 bytes", "flood-wire-to-guest-60", "delivered_mpps"),
            group("512 bytes", "flood-wire-to-guest-512", "delivered_mpps"),
            group("1514 bytes", "flood-wire-to-guest-1514", "delivered_mpps"),
        ],
    },
];

const LOSSLESS: &[Bars] = &[
    Bars {
        title: "guest to wire",
        unit: "million frames/s",
        groups: &[
            group("60 bytes", "throughput-guest-to-wire-60", "lossless_mpps"),
            group("512 bytes", "throughput-guest-to-wire-512", "lossless_mpps"),
            group("1514 bytes", "throughput-guest-to-wire-1514", "lossless_mpps"),
        ],
    },
    Bars {
        title: "wire to guest",
        unit: "million frames/s",
        groups: &[
            group("60 bytes", "throughput-wire-to-guest-60", "lossless_mpps"),
            group("512 bytes", "throughput-wire-to-guest-512", "lossless_mpps"),
            group("1514 bytes", "throughput-wire-to-guest-1514", "lossless_mpps"),
        ],
    },
];

const TCP: &[Bars] = &[Bars {
    title: "",
    unit: "Gbit/s",
    groups: &[
        group("to wire, 1 stream", "tcp-guest-to-wire-1", "gbit_per_s"),
        group("to wire, 8", "tcp-guest-to-wire-8", "gbit_per_s"),
        group("to guest, 1 stream", "tcp-wire-to-guest-1", "gbit_per_s"),
        group("to guest, 8", "tcp-wire-to-guest-8", "gbit_per_s"),
    ],
}];

const COST: &[Bars] = &[
    Bars {
        title: "per frame, 50 000 frames/s, generator and sink included",
        unit: "ns per frame",
        groups: &[
            group("to wire, 60", "cost-guest-to-wire-60", "busy_ns_per_frame"),
            group("to wire, 1514", "cost-guest-to-wire-1514", "busy_ns_per_frame"),
            group("to guest, 60", "cost-wire-to-guest-60", "busy_ns_per_frame"),
            group("to guest, 1514", "cost-wire-to-guest-1514", "busy_ns_per_frame"),
        ],
    },
    Bars {
        title: "per byte of bulk TCP, both stacks included",
        unit: "ns per KiB",
        groups: &[
            group("to wire, 1 stream", "tcp-guest-to-wire-1", "busy_ns_per_kibibyte"),
            group("to wire, 8", "tcp-guest-to-wire-8", "busy_ns_per_kibibyte"),
            group("to guest, 1 stream", "tcp-wire-to-guest-1", "busy_ns_per_kibibyte"),
            group("to guest, 8", "tcp-wire-to-guest-8", "busy_ns_per_kibibyte"),
        ],
    },
];

/// The JSON, and which colour is whose.
struct Report<'a> {
    measurements: &'a [Value],
    datapaths: Vec<&'a str>,
    footer: String,
}

impl<'a> Report<'a> {
    fn new(report: &'a Value) -> Result<Self> {
        let measurements = report.get("measurements").and_then(Value::as_array);
        let datapaths = report.pointer("/run/datapaths").and_then(Value::as_array);
        let text = |pointer| {
            report
                .pointer(pointer)
                .map(|value| value.to_string().replace('"', ""))
                .unwrap_or_default()
        };
        Ok(Self {
            measurements: measurements.context("not a report of this harness: no measurements")?,
            datapaths: datapaths
                .context("not a report of this harness: no datapaths")?
                .iter()
                .filter_map(Value::as_str)
                .collect(),
            footer: format!(
                "{}, {} CPUs, Linux {}; rounds: {}; macvtap does no VLAN work{}",
                text("/run/machine/processor"),
                text("/run/machine/processors"),
                text("/run/machine/kernel"),
                text("/run/rounds"),
                match report.get("disturbed").and_then(Value::as_u64) {
                    None | Some(0) => "",
                    Some(_) => "; DISTURBED BY OTHER WORK: not to be quoted",
                },
            ),
        })
    }

    fn made(&self, workload: &str, datapath: &str) -> impl Iterator<Item = &'a Value> {
        self.measurements.iter().filter(move |made| {
            made.get("workload").and_then(Value::as_str) == Some(workload)
                && made.get("datapath").and_then(Value::as_str) == Some(datapath)
        })
    }

    fn values(&self, workload: &str, datapath: &str, figure: &str) -> Vec<f64> {
        self.made(workload, datapath)
            .filter_map(|made| made.get("figures")?.get(figure)?.as_f64())
            .collect()
    }

    fn has(&self, panel: &Bars) -> bool {
        let all = panel
            .groups
            .iter()
            .flat_map(|group| self.datapaths.iter().map(move |datapath| (group, datapath)));
        all.into_iter().any(|(group, datapath)| {
            !self.values(group.workload, datapath, group.figure).is_empty()
        })
    }

    /// A curve, point by point the median over the rounds.
    fn curve(&self, workload: &str, datapath: &str, name: &str) -> Vec<(f64, f64)> {
        let rounds: Vec<Vec<(f64, f64)>> = self
            .made(workload, datapath)
            .filter_map(|made| made.get("curves")?.get(name)?.as_array())
            .map(|points| {
                let pair = |point: &Value| Some((point.get(0)?.as_f64()?, point.get(1)?.as_f64()?));
                points.iter().filter_map(pair).collect()
            })
            .collect();
        let length = rounds.iter().map(Vec::len).min().unwrap_or(0);
        (0..length)
            .filter_map(|index| {
                let at: Vec<(f64, f64)> =
                    rounds.iter().filter_map(|round| round.get(index).copied()).collect();
                let across = spread(&at.iter().map(|point| point.0).collect::<Vec<_>>())?;
                let up = spread(&at.iter().map(|point| point.1).collect::<Vec<_>>())?;
                Some((across.median, up.median))
            })
            .collect()
    }

    fn lines(&self, line: impl Fn(&str) -> Vec<(f64, f64)>) -> Vec<(usize, Vec<(f64, f64)>)> {
        let all =
            self.datapaths.iter().enumerate().map(|(index, datapath)| (index, line(datapath)));
        all.filter(|(_, points)| !points.is_empty()).collect()
    }

    fn overload(&self) -> Vec<Lines> {
        [
            ("guest to wire", "throughput-guest-to-wire-60"),
            ("wire to guest", "throughput-wire-to-guest-60"),
        ]
        .map(|(title, workload)| Lines {
            title,
            across: "offered, million frames/s",
            up: "delivered, million frames/s",
            logarithmic: false,
            diagonal: true,
            lines: self.lines(|datapath| {
                let mut curve = self.curve(workload, datapath, "overload");
                curve.sort_by(|one, other| one.0.total_cmp(&other.0));
                curve
            }),
        })
        .into()
    }

    fn round_trips(&self) -> Vec<Lines> {
        [
            ("back to back", "rtt-back-to-back"),
            ("idle, one each 0.5 ms", "rtt-idle"),
            ("half load", "rtt-half-load"),
        ]
        .map(|(title, workload)| Lines {
            title,
            across: "share of echoes answered within",
            up: "microseconds",
            logarithmic: true,
            diagonal: false,
            // Nines: 1 is 90 %, 2 is 99 %, 3 is 99.9 %.
            lines: self.lines(|datapath| {
                let curve = self.curve(workload, datapath, "distribution");
                curve.into_iter().map(|(share, time)| (-(1.0 - share).log10(), time)).collect()
            }),
        })
        .into()
    }

    fn ports(&self) -> Vec<Lines> {
        [("guest to wire", "to_wire_mpps"), ("wire to guest", "to_guest_mpps")]
            .map(|(title, figure)| Lines {
                title,
                across: "mapped ports",
                up: "million frames/s",
                logarithmic: false,
                diagonal: false,
                // Powers of ten.
                lines: self.lines(|datapath| {
                    (0..=3_u32)
                        .filter_map(|power| {
                            let workload = format!("ports-{}", 10_u32.pow(power));
                            Some((
                                f64::from(power),
                                spread(&self.values(&workload, datapath, figure))?.median,
                            ))
                        })
                        .collect()
                }),
            })
            .into()
    }

    /// Title, panels side by side, legend.
    fn page(
        &self,
        path: &Path,
        title: &str,
        panels: usize,
        panel: impl Fn(&Area, usize) -> Result<()>,
    ) -> Result<()> {
        let height = TITLE_HEIGHT + PANEL_HEIGHT + 2 * LEGEND_HEIGHT;
        let root = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
        root.fill(&WHITE).map_err(drawing)?;
        let (head, rest) = root.split_vertically(TITLE_HEIGHT);
        write(&head, title, (i32::try_from(WIDTH / 2)?, 26), 20, HPos::Center)?;
        let (body, foot) = rest.split_vertically(PANEL_HEIGHT);
        for (index, area) in body.split_evenly((1, panels)).iter().enumerate() {
            panel(area, index)?;
        }
        self.legend(&foot)?;
        root.present().map_err(drawing).with_context(|| format!("cannot write {}", path.display()))
    }

    fn legend(&self, area: &Area) -> Result<()> {
        let step = i32::try_from(WIDTH)? / i32::try_from(self.datapaths.len().max(1))?;
        let step = step.min(190);
        let used = step * i32::try_from(self.datapaths.len())?;
        let mut left = (i32::try_from(WIDTH)? - used) / 2 + 10;
        for (index, datapath) in self.datapaths.iter().enumerate() {
            let mark = Rectangle::new([(left, 8), (left + 14, 22)], colour(index).filled());
            area.draw(&mark).map_err(drawing)?;
            write(area, datapath, (left + 20, 15), 14, HPos::Left)?;
            left += step;
        }
        write(area, &self.footer, (i32::try_from(WIDTH / 2)?, 50), 12, HPos::Center)
    }

    fn bars(&self, area: &Area, panel: &Bars) -> Result<()> {
        let mut bars = Vec::new();
        for (place, group) in panel.groups.iter().enumerate() {
            for (index, datapath) in self.datapaths.iter().enumerate() {
                if let Some(values) = spread(&self.values(group.workload, datapath, group.figure)) {
                    bars.push((place, index, values));
                }
            }
        }
        let top = bars.iter().map(|(_, _, values)| values.greatest).fold(0.0, f64::max) * 1.12;
        let groups = panel.groups.len() as f64;
        let mut chart = ChartBuilder::on(area)
            .caption(panel.title, (FONT, 15))
            .margin(12)
            .x_label_area_size(34)
            .y_label_area_size(62)
            .build_cartesian_2d(0.0..groups, 0.0..top.max(f64::MIN_POSITIVE))
            .map_err(drawing)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(0)
            .y_desc(panel.unit)
            .label_style((FONT, 12))
            .axis_desc_style((FONT, 13))
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .draw()
            .map_err(drawing)?;
        let width = 0.8 / self.datapaths.len().max(1) as f64;
        for (place, index, values) in bars {
            let left = place as f64 + 0.1 + width * index as f64;
            let middle = left + width / 2.0;
            let bar = Rectangle::new(
                [(left + width * 0.05, 0.0), (left + width * 0.95, values.median)],
                colour(index).filled(),
            );
            let whisker = PathElement::new(
                [(middle, values.least), (middle, values.greatest)],
                BLACK.stroke_width(1),
            );
            chart.draw_series([bar]).map_err(drawing)?;
            chart.draw_series([whisker]).map_err(drawing)?;
            let (x, y) = chart.backend_coord(&(middle, values.greatest));
            write_absolute(area, &short(values.median), (x, y - 8), 10)?;
        }
        for (place, group) in panel.groups.iter().enumerate() {
            let (x, y) = chart.backend_coord(&(place as f64 + 0.5, 0.0));
            write_absolute(area, group.label, (x, y + 16), 12)?;
        }
        Ok(())
    }
}

fn lines_panel(area: &Area, panel: &Lines) -> Result<()> {
    let points = || panel.lines.iter().flat_map(|(_, points)| points);
    let right = points().map(|point| point.0).fold(0.0, f64::max);
    let top = points().map(|point| point.1).fold(0.0, f64::max);
    let bottom = points().map(|point| point.1).fold(f64::INFINITY, f64::min);
    let nines = |nines: &f64| match *nines {
        0.0 => "0".to_owned(),
        nines => format!("{} %", 100.0 - 100.0 / 10.0_f64.powf(nines)),
    };
    let powers = |power: &f64| format!("{:.0}", 10.0_f64.powf(*power));
    let plain = |value: &f64| short(*value);
    let whole: Vec<&dyn Fn(&f64) -> String> = vec![&nines, &powers, &plain];
    let kind = match panel.across {
        "share of echoes answered within" => 0,
        "mapped ports" => 1,
        _ => 2,
    };
    let label = whole.get(kind).copied().unwrap_or(&plain);
    let mut builder = ChartBuilder::on(area);
    builder
        .caption(panel.title, (FONT, 15))
        .margin(12)
        .margin_right(26)
        .x_label_area_size(44)
        .y_label_area_size(62);
    let steps = if kind == 2 { 8 } else { 4 };
    macro_rules! draw_on {
        ($chart:expr) => {{
            let mut chart = $chart.map_err(drawing)?;
            chart
                .configure_mesh()
                .x_labels(steps)
                .x_label_formatter(label)
                .y_label_formatter(&|value: &f64| short(*value))
                .x_desc(panel.across)
                .y_desc(panel.up)
                .label_style((FONT, 12))
                .axis_desc_style((FONT, 13))
                .light_line_style(TRANSPARENT)
                .bold_line_style(BLACK.mix(0.12))
                .draw()
                .map_err(drawing)?;
            if panel.diagonal {
                let end = right.min(top);
                let style = BLACK.mix(0.4).stroke_width(1);
                let ends = [(0.0, 0.0), (end, end)];
                chart.draw_series(DashedLineSeries::new(ends, 4, 4, style)).map_err(drawing)?;
            }
            for (index, points) in &panel.lines {
                let style = colour(*index).stroke_width(2);
                chart
                    .draw_series(LineSeries::new(points.iter().copied(), style))
                    .map_err(drawing)?;
                if kind != 0 {
                    let dots =
                        points.iter().map(|&point| Circle::new(point, 3, colour(*index).filled()));
                    chart.draw_series(dots).map_err(drawing)?;
                }
            }
        }};
    }
    if panel.logarithmic {
        draw_on!(builder.build_cartesian_2d(0.0..right, (bottom * 0.8..top * 1.2).log_scale()));
    } else {
        draw_on!(builder.build_cartesian_2d(-0.02 * right..right * 1.05, 0.0..top * 1.1));
    }
    Ok(())
}

fn colour(index: usize) -> RGBColor {
    COLOURS.get(index % COLOURS.len()).copied().unwrap_or(BLACK)
}

/// Three significant digits, no more.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        0.0 => "0".into(),
        _ => format!("{value:.2}"),
    }
}

fn write(area: &Area, text: &str, at: (i32, i32), size: u32, side: HPos) -> Result<()> {
    let style = TextStyle::from((FONT, size)).pos(Pos::new(side, VPos::Center));
    area.draw(&Text::new(text.to_owned(), at, style)).map_err(drawing)
}

/// Writes at a place counted from the corner of the page, centred.
fn write_absolute(area: &Area, text: &str, at: (i32, i32), size: u32) -> Result<()> {
    let (left, top) = area.get_base_pixel();
    write(area, text, (at.0 - left, at.1 - top), size, HPos::Center)
}

fn drawing(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}
