//! `simulator`: runs seeds, and prints those that fail with the command that replays them.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Parser;
use simulator::{Coverage, Path, run, run_hostile, run_unbroken};

/// Runs Understudy's protocol engine between real TCP stacks, in virtual time.
#[derive(Parser)]
struct Arguments {
    /// Run this seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Run a range of seeds, FROM..TO.
    #[arg(long, value_parser = range)]
    seeds: Option<(u64, u64)>,
    /// Run this many fresh seeds, which come from the time.
    #[arg(long)]
    fresh: Option<u64>,
    /// Threads that run seeds.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Print each packet and event (with --seed).
    #[arg(long)]
    verbose: bool,
    /// Print the knobs that the seed stands for (with --seed).
    #[arg(long)]
    knobs: bool,
    /// Run each seed twice and compare; the second run never restores the engine from a saved state.
    #[arg(long)]
    twice: bool,
    /// Leave the engine out: a failure is then the simulator's own.
    #[arg(long)]
    bare: bool,
    /// Let a data plane pass conversations by itself, as the kernel does.
    #[arg(long)]
    kernel: bool,
    /// Add hostile clients and hostile replicas.
    #[arg(long, conflicts_with_all = ["twice", "bare"])]
    hostile: bool,
    /// Succeed with at most this many failures; each is printed nevertheless.
    #[arg(long, default_value_t = 0)]
    tolerate: usize,
    /// Stop after this many failures.
    #[arg(long, default_value_t = 10)]
    failures: usize,
}

fn range(text: &str) -> Result<(u64, u64), String> {
    let (from, to) = text.split_once("..").ok_or("want FROM..TO")?;
    let number = |s: &str| s.parse::<u64>().map_err(|e| e.to_string());
    Ok((number(from)?, number(to)?))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let (from, to) = match (arguments.seed, arguments.seeds, arguments.fresh) {
        (Some(seed), _, _) => (seed, seed.saturating_add(1)),
        (None, Some(range), _) => range,
        (None, None, fresh) => {
            let time =
                SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_micros() as u64;
            (time, time + fresh.unwrap_or(200))
        }
    };
    if arguments.knobs {
        println!("{}", simulator::knobs(from, arguments.hostile));
    }
    if !arguments.verbose {
        // A panic is reported with its seed.
        std::panic::set_hook(Box::new(|_| {}));
    }
    let path = match (arguments.bare, arguments.kernel) {
        (true, _) => Path::Bare,
        (false, true) => Path::Kernel,
        (false, false) => Path::Daemon,
    };
    let next = AtomicU64::new(from);
    let total = Mutex::new((Coverage::default(), Vec::new(), 0u64));
    let lock = || total.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    std::thread::scope(|scope| {
        for _ in 0..arguments.jobs.max(1).min((to - from) as usize) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= to || lock().1.len() >= arguments.failures {
                        return;
                    }
                    let play = if arguments.hostile { run_hostile } else { run };
                    let mut report = play(seed, arguments.verbose, path);
                    if arguments.twice && run_unbroken(seed, path).digest != report.digest {
                        report.failure = Some("two runs of the seed differ".into());
                    }
                    let mut total = lock();
                    total.0.merge(&report.coverage);
                    total.2 += 1;
                    if let Some(failure) = report.failure {
                        println!("seed {seed} failed: {failure}");
                        if total.1.len() < 10 {
                            let kernel = if arguments.kernel { " --kernel" } else { "" };
                            let hostile = if arguments.hostile { " --hostile" } else { "" };
                            println!(
                                "  replay: cargo run --release -p simulator -- --seed {seed}{kernel}{hostile} --verbose"
                            );
                        }
                        total.1.push(seed);
                    }
                }
            });
        }
    });
    let (coverage, failed, runs) = &*lock();
    print!("{coverage}");
    if *runs >= 500 {
        for name in coverage.missing(arguments.hostile) {
            println!("NOT EXERCISED: {name}");
        }
    }
    println!("seeds {from}..{to}: {runs} runs, {} failed", failed.len());
    if failed.len() <= arguments.tolerate { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
