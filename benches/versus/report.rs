//! Tables for the terminal, and the JSON with everything measured.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::statistics::{Spread, spread};
use super::workload::{Outcome, Workload};

/// One measurement.
#[derive(Clone, Debug)]
pub struct Measurement {
    /// Round it was made in.
    pub round: usize,
    /// [`Workload::name`].
    pub workload: String,
    /// Name of the column.
    pub datapath: String,
    /// What was found.
    pub outcome: Outcome,
}

/// Everything measured in a run.
#[derive(Clone, Debug, Default)]
pub struct Results {
    /// All measurements, in the order they were made.
    pub measurements: Vec<Measurement>,
    /// What could not be measured: workload, datapath, reason.
    pub failures: Vec<(String, String, String)>,
}

impl Results {
    /// What an earlier run wrote by [`Results::to_json`].
    pub fn from_json(report: &Value) -> Result<Self> {
        let list = |name| {
            report.get(name).and_then(Value::as_array).with_context(|| format!("no {name} in it"))
        };
        let text = |value: &Value, name: &str| {
            value
                .get(name)
                .and_then(Value::as_str)
                .map(String::from)
                .with_context(|| format!("no {name} in it"))
        };
        let mut results = Self::default();
        for made in list("measurements")? {
            let figures =
                made.get("figures").and_then(Value::as_object).context("no figures in it")?;
            let figures =
                figures.iter().filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)));
            results.measurements.push(Measurement {
                round: made.get("round").and_then(Value::as_u64).context("no round in it")?
                    as usize,
                workload: text(made, "workload")?,
                datapath: text(made, "datapath")?,
                // The curves are drawn from the JSON itself.
                outcome: Outcome { figures: figures.collect(), ..Outcome::default() },
            });
        }
        for failure in list("failures")? {
            results.failures.push((
                text(failure, "workload")?,
                text(failure, "datapath")?,
                text(failure, "reason")?,
            ));
        }
        Ok(results)
    }

    fn by_round(&self, workload: &str, datapath: &str, figure: &str) -> BTreeMap<usize, f64> {
        self.measurements
            .iter()
            .filter(|made| made.workload == workload && made.datapath == datapath)
            .filter_map(|made| Some((made.round, *made.outcome.figures.get(figure)?)))
            .collect()
    }

    /// Spread of a figure over the rounds.
    pub fn spread(&self, workload: &str, datapath: &str, figure: &str) -> Option<Spread> {
        let values: Vec<f64> = self.by_round(workload, datapath, figure).into_values().collect();
        spread(&values)
    }

    /// Spread of the ratios to another datapath, each within one round.
    pub fn ratio(
        &self,
        workload: Workload,
        datapath: &str,
        base: &str,
        figure: &str,
    ) -> Option<Spread> {
        let bases = self.by_round(&workload.compared_with().name(), base, figure);
        let ratios: Vec<f64> = self
            .by_round(&workload.name(), datapath, figure)
            .into_iter()
            .filter_map(|(round, value)| Some(value / bases.get(&round)?))
            .collect();
        spread(&ratios)
    }

    /// A datapath's figure in one workload to its own in another, round by round.
    pub fn ratio_within(
        &self,
        datapath: &str,
        workload: Workload,
        other: Workload,
        figure: &str,
    ) -> Option<Spread> {
        let bases = self.by_round(&other.name(), datapath, figure);
        let ratios: Vec<f64> = self
            .by_round(&workload.name(), datapath, figure)
            .into_iter()
            .filter_map(|(round, value)| Some(value / bases.get(&round)?))
            .collect();
        spread(&ratios)
    }

    /// Measurements in which other programs or the hypervisor took a share of the processors.
    pub fn disturbed(&self) -> usize {
        self.measurements
            .iter()
            .filter(|made| made.outcome.figures.get("disturbed").is_some_and(|&flag| flag > 0.0))
            .count()
    }

    /// The tables for people: a line for each figure, a column for each datapath.
    pub fn table(&self, workloads: &[Workload], datapaths: &[String], base: &str) -> String {
        let mut text = format!("{:<30} {:<22}", "workload", "figure");
        let width = datapaths.iter().map(String::len).max().unwrap_or(0).max(26);
        for datapath in datapaths {
            text.push_str(&format!("  {datapath:<width$}"));
        }
        text.push('\n');
        for workload in workloads {
            let name = workload.name();
            for &(figure, more_is_better) in workload.headline() {
                let mut line = format!(
                    "{name:<30} {:<22}",
                    format!("{figure} {}", if more_is_better { '+' } else { '-' })
                );
                let mut any = false;
                for datapath in datapaths {
                    let cell = self.cell(*workload, datapath, base, figure);
                    any |= cell.is_some();
                    line.push_str(&format!("  {:<width$}", cell.unwrap_or_else(|| "-".into())));
                }
                if any {
                    text.push_str(line.trim_end());
                    text.push('\n');
                }
            }
        }
        text.push_str(
            "\n+ more is better, - less is better. Median over the rounds, then the median of the ratios to macvtap\n\
             within each round (least..greatest); ports-N: ratio to macvtap with its one port.\n",
        );
        let mut reasons: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
        for (workload, datapath, reason) in &self.failures {
            reasons.entry((datapath, reason)).or_default().push(workload);
        }
        for ((datapath, reason), mut workloads) in reasons {
            workloads.dedup();
            text.push_str(&format!(
                "not measured with {datapath}: {}: {reason}\n",
                workloads.join(", ")
            ));
        }
        if self.disturbed() > 0 {
            text.push_str(&format!(
                "WARNING: in {} of {} measurements other programs or the hypervisor took processor time: \
                 these figures are not to be quoted\n",
                self.disturbed(),
                self.measurements.len()
            ));
        }
        text
    }

    fn cell(&self, workload: Workload, datapath: &str, base: &str, figure: &str) -> Option<String> {
        let median = self.spread(&workload.name(), datapath, figure)?.median;
        let digits = if median >= 100.0 { 0 } else { 3 };
        // A flag, and what a generator could do, are nobody's merit.
        let comparable =
            datapath != base && !["generator_bound", "load_reached_at_3x"].contains(&figure);
        let ratio = self.ratio(workload, datapath, base, figure).filter(|_| comparable);
        Some(ratio.map_or_else(
            || format!("{median:.digits$}"),
            |ratio| {
                format!(
                    "{median:.digits$}  x{:.2} ({:.2}..{:.2})",
                    ratio.median, ratio.least, ratio.greatest
                )
            },
        ))
    }

    /// All that was measured, and the table's medians and ratios.
    pub fn to_json(
        &self,
        run: Value,
        workloads: &[Workload],
        datapaths: &[String],
        base: &str,
    ) -> Value {
        let measurements: Vec<Value> = self
            .measurements
            .iter()
            .map(|made| {
                json!({
                    "round": made.round, "workload": made.workload, "datapath": made.datapath,
                    "figures": made.outcome.figures, "curves": made.outcome.curves,
                })
            })
            .collect();
        let shown = |spread: Spread| json!({"median": spread.median, "least": spread.least, "greatest": spread.greatest});
        let mut summary = Vec::new();
        for workload in workloads {
            let name = workload.name();
            for &(figure, more_is_better) in workload.headline() {
                for datapath in datapaths {
                    if let Some(values) = self.spread(&name, datapath, figure) {
                        summary.push(json!({
                            "workload": name, "figure": figure, "more_is_better": more_is_better,
                            "datapath": datapath, "value": shown(values),
                            "ratio": self.ratio(*workload, datapath, base, figure).map(shown),
                        }));
                    }
                }
            }
        }
        let failures: Vec<Value> = self
            .failures
            .iter()
            .map(|(workload, datapath, reason)| json!({"workload": workload, "datapath": datapath, "reason": reason}))
            .collect();
        json!({
            "run": run, "ratio_base": base, "summary": summary, "measurements": measurements, "failures": failures,
            "disturbed": self.disturbed(),
        })
    }
}
