//! Figures and their bounds, as one table and as JSON. Must not know how a figure came about.

use std::time::Duration;

use serde_json::{Value, json};

/// What a figure must keep to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Bound {
    Below(f64),
    AtLeast(f64),
    Exactly(f64),
    /// Only told.
    None,
}

impl Bound {
    fn holds(self, value: f64) -> bool {
        match self {
            Self::Below(most) => value < most,
            Self::AtLeast(least) => value >= least,
            Self::Exactly(wanted) => value == wanted,
            Self::None => true,
        }
    }

    fn text(self) -> String {
        match self {
            Self::Below(most) => format!("< {}", number(most)),
            Self::AtLeast(least) => format!(">= {}", number(least)),
            Self::Exactly(wanted) => format!("= {}", number(wanted)),
            Self::None => String::new(),
        }
    }
}

struct Row {
    phase: &'static str,
    name: String,
    value: f64,
    unit: &'static str,
    bound: Bound,
}

/// Everything that was measured.
#[derive(Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
    /// What went wrong, in words; samples, not all of it.
    remarks: Vec<String>,
}

impl Report {
    pub(crate) fn figure(
        &mut self,
        phase: &'static str,
        name: impl Into<String>,
        value: f64,
        unit: &'static str,
        bound: Bound,
    ) {
        self.rows.push(Row { phase, name: name.into(), value, unit, bound });
    }

    /// A time, in milliseconds.
    pub(crate) fn time(
        &mut self,
        phase: &'static str,
        name: impl Into<String>,
        time: Duration,
        bound: Bound,
    ) {
        self.figure(phase, name, time.as_secs_f64() * 1e3, "ms", bound);
    }

    pub(crate) fn remark(&mut self, remark: String) {
        self.remarks.push(remark);
    }

    pub(crate) fn missed(&self) -> usize {
        self.rows.iter().filter(|row| !row.bound.holds(row.value)).count()
    }

    pub(crate) fn table(&self) -> String {
        let name_width = self.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        let mut text = format!(
            "{:<9}  {:<name_width$}  {:>12}  {:<4}  {:<10}\n",
            "phase", "figure", "value", "", "bound"
        );
        for row in &self.rows {
            let verdict = match row.bound {
                Bound::None => "",
                bound if bound.holds(row.value) => "ok",
                _ => "MISSED",
            };
            let (value, bound) = (number(row.value), row.bound.text());
            let line = format!(
                "{:<9}  {:<name_width$}  {value:>12}  {:<4}  {bound:<10}  {verdict}",
                row.phase, row.name, row.unit
            );
            text += line.trim_end();
            text.push('\n');
        }
        for remark in &self.remarks {
            text.extend(["! ", remark, "\n"]);
        }
        text
    }

    pub(crate) fn json(&self) -> Value {
        let row = |row: &Row| {
            json!({
                "phase": row.phase,
                "figure": row.name,
                "value": row.value,
                "unit": row.unit,
                "bound": row.bound.text(),
                "holds": row.bound.holds(row.value),
            })
        };
        let rows: Vec<Value> = self.rows.iter().map(row).collect();
        json!({ "figures": rows, "remarks": self.remarks, "missed": self.missed() })
    }
}

fn number(value: f64) -> String {
    if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_bound_is_seen_in_table_and_json() {
        let mut report = Report::default();
        report.figure("soak", "5xx", 0.0, "", Bound::Exactly(0.0));
        report.figure("soak", "disconnects", 99.0, "", Bound::AtLeast(100.0));
        report.time("overload", "p99", Duration::from_millis(50), Bound::Below(50.0));
        report.figure("overload", "ratio", f64::NAN, "", Bound::Below(1.2));
        report.figure("overload", "told", 1.255, "s", Bound::None);
        report.remark("why".into());
        assert_eq!(report.missed(), 3);
        let table = report.table();
        assert_eq!(table.matches("MISSED").count(), 3, "{table}");
        assert!(table.contains(">= 100") && table.contains("! why"), "{table}");
        let json = report.json();
        assert_eq!((&json["missed"], &json["figures"][0]["holds"]), (&json!(3), &json!(true)));
    }
}
