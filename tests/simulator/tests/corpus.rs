//! Every seed that ever failed, and a number of fresh ones (`SIM_SEEDS`, default 200).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use simulator::{Coverage, Path, run, run_hostile, run_unbroken};

fn must_pass(seeds: impl Iterator<Item = u64>, path: Path) -> Coverage {
    let kernel = if path == Path::Kernel { " --kernel" } else { "" };
    let mut failures = Vec::new();
    let mut coverage = Coverage::default();
    for seed in seeds {
        let report = run(seed, false, path);
        coverage.merge(&report.coverage);
        if let Some(failure) = report.failure {
            failures.push(format!(
                "seed {seed}: {failure}\n  replay: cargo run --release -p simulator -- --seed {seed}{kernel} --verbose"
            ));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    coverage
}

#[test]
fn seeds_that_failed_once_pass() {
    must_pass(seeds(include_str!("../seeds.txt")), Path::Daemon);
}

#[test]
fn seeds_that_failed_once_with_a_plane_that_passes_pass() {
    must_pass(seeds(include_str!("../seeds-kernel.txt")), Path::Kernel);
}

/// On both paths: most of them failed on both.
#[test]
fn hostile_seeds_that_failed_once_pass() {
    let mut failures = Vec::new();
    for seed in seeds(include_str!("../seeds-hostile.txt")) {
        for (path, kernel) in [(Path::Daemon, ""), (Path::Kernel, " --kernel")] {
            failures.extend(run_hostile(seed, false, path).failure.map(|failure| {
                format!(
                    "seed {seed}: {failure}\n  replay: cargo run --release -p simulator -- --seed {seed}{kernel} --hostile --verbose"
                )
            }));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn seeds(corpus: &str) -> impl Iterator<Item = u64> {
    corpus.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
        let seed = line.split_whitespace().next()?.parse().ok();
        assert!(seed.is_some(), "not a seed: {line}");
        seed
    })
}

#[test]
fn fresh_seeds_pass() {
    let count = std::env::var("SIM_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(200);
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let first = time.as_micros() as u64;
    println!("seeds {first}..{}", first + count);
    must_pass(first..first + count, Path::Daemon);
}

#[test]
fn a_seed_replays_to_the_last_bit() {
    for seed in 0..10 {
        assert_eq!(
            run(seed, false, Path::Daemon).digest,
            run(seed, false, Path::Daemon).digest,
            "seed {seed}"
        );
    }
}

#[test]
fn a_restored_engine_does_what_the_saved_one_would_have_done() {
    let mut restored = 0;
    for seed in 0..100 {
        for path in [Path::Daemon, Path::Kernel] {
            let report = run(seed, false, path);
            assert_eq!(report.digest, run_unbroken(seed, path).digest, "seed {seed}, {path:?}");
            restored += report.coverage.count("engine.restored");
        }
    }
    assert!(restored > 500, "{restored} times restored");
}

#[test]
fn without_the_engine_nothing_fails() {
    for seed in 0..50 {
        assert_eq!(run(seed, false, Path::Bare).failure, None, "seed {seed}");
    }
}

#[test]
fn enough_is_exercised() {
    let coverage = must_pass(0..400, Path::Daemon);
    assert_eq!(coverage.missing(false), Vec::<&str>::new(), "\n{coverage}");
}
