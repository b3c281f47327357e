use serde_json::Value;

use super::*;

/// Inputs and outputs of the original, sample by sample.
fn golden() -> Value {
    serde_json::from_str(include_str!(
        "../../../../tests/vectors/telemetry/stats_golden.json"
    ))
    .unwrap()
}

fn filter(names: &Value) -> &'static [Statistic] {
    let mut list: Vec<Statistic> = names
        .as_array()
        .unwrap()
        .iter()
        .map(|name| match name.as_str().unwrap() {
            "avg" => Statistic::Average,
            "max" => Statistic::Maximum,
            "rate" => Statistic::Rate,
            other => panic!("unknown statistic {other}"),
        })
        .collect();
    list.sort();
    Box::leak(list.into_boxed_slice())
}

fn number(text: &Value) -> Decimal {
    Decimal::from_str_exact(text.as_str().unwrap()).unwrap()
}

/// The measurements of one sample of a group of inputs.
fn measurements(inputs: &Value, sample: usize, elapsed_ms: Decimal) -> Vec<Measurement> {
    inputs
        .as_object()
        .unwrap()
        .iter()
        .map(|(key, input)| {
            let current = match input["hook"].as_str() {
                None => Current::Value,
                Some("diff") => Current::Difference,
                Some("rate") => Current::Rate,
                Some(other) => panic!("unknown hook {other}"),
            };
            let quantity = Quantity {
                key: key.clone().into(),
                unit: Box::leak(input["unit"].as_str().unwrap().to_owned().into_boxed_str()),
                current,
                statistics: filter(&input["filt"]),
            };
            let capacity = match input["cap"].as_str() {
                None => None,
                Some("interval") => Some(elapsed_ms),
                Some(_) => Some(number(&input["cap"])),
            };
            Measurement::of(quantity, number(&input["v"][sample]), capacity)
        })
        .collect()
}

#[test]
fn records_are_those_of_the_original() {
    let golden = golden();
    let mut kernel = Metrics::new(MissingCapacity::FirstValue);
    let mut node = Metrics::new(MissingCapacity::Absent);
    let mut last_ms: Option<Decimal> = None;
    for (sample, output) in golden["outputs"].as_array().unwrap().iter().enumerate() {
        let clock_ms = Decimal::try_from(output["clock"].as_f64().unwrap() * 1000.0)
            .unwrap()
            .round();
        let at_ns = u64::try_from(clock_ms * Decimal::from(1_000_000)).unwrap();
        let elapsed = last_ms.map_or(Decimal::ZERO, |last| clock_ms - last);
        last_ms = Some(clock_ms);
        node.observe(
            measurements(&golden["inputs"]["node"], sample, elapsed),
            at_ns,
        );
        kernel.observe(
            measurements(&golden["inputs"]["kernel"], sample, elapsed),
            at_ns,
        );
        let text = |record: &Record| serde_json::to_string(record).unwrap();
        assert_eq!(
            text(&node.record()),
            output["agent"]["node"].to_string(),
            "{sample}"
        );
        assert_eq!(
            text(&kernel.record()),
            output["kernel"].to_string(),
            "{sample}"
        );
    }
}

#[test]
fn a_counter_that_went_back_counts_from_there() {
    let quantity = || Quantity::new("io_read", "bytes", Current::Difference, &[Statistic::Rate]);
    let mut metrics = Metrics::new(MissingCapacity::Absent);
    for (second, value) in [(1, 100_u64), (2, 40), (4, 60)] {
        let measurement = Measurement::of(quantity(), value.into(), None);
        metrics.observe([measurement], second * 1_000_000_000);
        let figures = metrics.record().get("io_read").unwrap().clone();
        let (current, rate) = match second {
            1 => ("100", "0"),
            2 => ("0", "0"),
            _ => ("20", "10"),
        };
        assert_eq!(figures.current, current, "{second}");
        assert_eq!(figures.statistics, [("stats.rate", rate.to_owned())]);
    }
}

#[test]
fn nothing_overflows() {
    let quantity = || Quantity::new("x", "bytes", Current::Value, &[Statistic::Average]);
    let mut metric = Metric::begin(
        Measurement::of(quantity(), Decimal::MAX, Some(Decimal::ONE)),
        0,
        MissingCapacity::FirstValue,
    );
    metric.observe(Measurement::of(quantity(), Decimal::MAX, None), 0);
    let figures = metric.figures();
    assert_eq!(figures.percentage, "0.00");
    assert_eq!(figures.current, Decimal::MAX.to_string());
}
