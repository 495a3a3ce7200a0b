//! Tables for the terminal, and the JSON with everything measured.

use std::collections::BTreeMap;

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
    fn by_round(&self, workload: &str, datapath: &str, figure: &str) -> BTreeMap<usize, f64> {
        self.measurements
            .iter()
            .filter(|made| made.workload == workload && made.datapath == datapath)
            .filter_map(|made| Some((made.round, *made.outcome.figures.get(figure)?)))
            .collect()
    }

    /// Spread of a figure over the rounds.
    pub fn spread(&self, workload: &str, datapath: &str, figure: &str) -> Option<Spread> {
        let values: Vec<f64> = self
            .by_round(workload, datapath, figure)
            .into_values()
            .collect();
        spread(&values)
    }

    /// Spread of the ratios to another datapath, each within one round.
    pub fn ratio(
        &self,
        workload: &str,
        datapath: &str,
        base: &str,
        figure: &str,
    ) -> Option<Spread> {
        let base = self.by_round(workload, base, figure);
        let ratios: Vec<f64> = self
            .by_round(workload, datapath, figure)
            .into_iter()
            .filter_map(|(round, value)| Some(value / base.get(&round)?))
            .collect();
        spread(&ratios)
    }

    /// Measurements in which other programs or the hypervisor took a share of the processors.
    pub fn disturbed(&self) -> usize {
        self.measurements
            .iter()
            .filter(|made| {
                made.outcome
                    .figures
                    .get("disturbed")
                    .is_some_and(|&flag| flag > 0.0)
            })
            .count()
    }

    /// The tables for people.
    pub fn table(&self, workloads: &[Workload], datapaths: &[String], base: &str) -> String {
        let mut text = format!(
            "{:<26} {:<22} {:<16} {:>10} {:>21} {:>7} {:>15}\n",
            "workload", "figure", "datapath", "median", "spread", "ratio", "ratio spread"
        );
        for workload in workloads {
            let name = workload.name();
            for &(figure, more_is_better) in workload.headline() {
                for datapath in datapaths {
                    let Some(values) = self.spread(&name, datapath, figure) else {
                        continue;
                    };
                    let ratio = self
                        .ratio(&name, datapath, base, figure)
                        .filter(|_| datapath != base);
                    let shown_figure =
                        format!("{figure} {}", if more_is_better { "^" } else { "v" });
                    text.push_str(&format!(
                        "{name:<26} {shown_figure:<22} {datapath:<16} {:>10.3} {:>21} {:>7} {:>15}\n",
                        values.median,
                        format!("{:.3}..{:.3}", values.least, values.greatest),
                        ratio.map_or_else(String::new, |ratio| format!("{:.2}", ratio.median)),
                        ratio.map_or_else(String::new, |ratio| format!("{:.2}..{:.2}", ratio.least, ratio.greatest)),
                    ));
                }
            }
        }
        text.push_str("^ more is better, v less is better; ratio: to macvtap in the same round, median over rounds\n");
        for (workload, datapath, reason) in &self.failures {
            text.push_str(&format!(
                "not measured: {workload} with {datapath}: {reason}\n"
            ));
        }
        if self.disturbed() > 0 {
            text.push_str(&format!(
                "WARNING: in {} of {} measurements other programs or the hypervisor took processor time: \
                 those figures are not to be quoted\n",
                self.disturbed(),
                self.measurements.len()
            ));
        }
        text
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
                            "ratio": self.ratio(&name, datapath, base, figure).map(shown),
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
        })
    }
}
