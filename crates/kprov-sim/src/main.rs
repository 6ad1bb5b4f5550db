//! Runs simulations and tells what happens: of a seed, of a script that a failing test printed, of many seeds, of a fleet.
#![expect(clippy::print_stdout, reason = "what happens is what this program is asked for")]

use std::process::ExitCode;

use kprov_sim::{Script, fleet, run, run_traced, shrink};

const USAGE: &str = "usage: kprov-sim seed NUMBER | seeds FROM TO | script JSON | fleet MACHINES MAX_UNAVAILABLE";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let script = match arguments.as_slice() {
        ["seed", seed] => seed.parse().ok().map(Script::of),
        ["seeds", from, to] => match (from.parse(), to.parse()) {
            (Ok(from), Ok(to)) => return seeds(from, to),
            _ => None,
        },
        ["script", json] => serde_json::from_str(json).ok(),
        ["fleet", machines, max] => match (machines.parse(), serde_json::from_str(max)) {
            (Ok(machines), Ok(max)) => {
                println!("{}", fleet::measure(machines, max));
                return ExitCode::SUCCESS;
            }
            _ => None,
        },
        _ => None,
    };
    let Some(script) = script else {
        println!("{USAGE}");
        return ExitCode::from(2);
    };
    let report = run_traced(&script, |_| {});
    for (at, line) in &report.trace {
        println!("{:>6}.{:03}  {line}", at / 1000, at % 1000);
    }
    match report.violation {
        None => {
            println!(
                "\nall held; {} s, {} polls of operators",
                report.elapsed / 1000,
                report.polls
            );
            ExitCode::SUCCESS
        }
        Some(violation) => {
            println!("\n{violation}");
            if arguments.first() == Some(&"seed")
                && let Some(shrunk) = shrink(&script, |_| {})
            {
                println!("\n{}", shrunk.explain());
            }
            ExitCode::FAILURE
        }
    }
}

/// Runs many seeds, and lists those that fail.
fn seeds(from: u64, to: u64) -> ExitCode {
    let mut failed = false;
    for seed in from..to {
        if let Some(violation) = run(&Script::of(seed)).violation {
            println!("{seed}: {violation}");
            failed = true;
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
