//! Do the targets hold on the kept corpus and on fresh random inputs? `FUZZ_INPUTS` sets how many.

use std::path::Path;

/// Marsaglia's xorshift; any generator will do.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn replay(name: &str, target: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let mut inputs: Vec<Vec<u8>> = Vec::new();
    for entry in std::fs::read_dir(corpus).expect("the corpus") {
        let path = entry.expect("an entry").path();
        let input = std::fs::read(&path).expect("an input");
        // Printed when the test fails.
        println!("{}", path.display());
        target(&input);
        inputs.push(input);
    }
    let count: u64 = std::env::var("FUZZ_INPUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(500);
    let seed = std::env::var("FUZZ_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0x5eed_u64);
    for number in 0..count {
        let mut random = Random(seed.wrapping_add(number).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..4 {
            random.next();
        }
        // An input of the corpus with a few bytes changed, or random bytes.
        let mut input = match inputs.len() as u64 {
            known if known > 0 && number % 4 != 0 => inputs[(random.next() % known) as usize].clone(),
            _ => (0..random.next() % 1500).map(|_| (random.next() >> 32) as u8).collect(),
        };
        for _ in 0..random.next() % 8 {
            let length = input.len().max(1);
            if let Some(byte) = input.get_mut(random.next() as usize % length) {
                *byte = (random.next() >> 32) as u8;
            }
        }
        println!("{name}: FUZZ_SEED={seed} number {number}");
        target(&input);
    }
}

#[test]
fn packets() {
    replay("packets", understudy_fuzz::packets);
}

#[test]
fn engine() {
    replay("engine", understudy_fuzz::engine);
}
