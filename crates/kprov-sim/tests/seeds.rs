//! Ten thousand simulated upgrades with everything that goes wrong in them. A failure prints the shortest script that repeats
//! it.

use kprov_sim::{Script, run, shrink};

/// Seeds in each of the tests below, which run side by side.
const SHARE: u64 = 1000;

/// The first seed of a share that fails, made short and explained.
fn failure(share: u64) -> Option<String> {
    let mut scripts = (share * SHARE..(share + 1) * SHARE).map(Script::of);
    let script = scripts.find(|script| run(script).violation.is_some())?;
    let shrunk = shrink(&script, |_| {}).expect("a run depends on nothing but its script");
    Some(shrunk.explain())
}

macro_rules! shares {
    ($($name:ident $share:literal)*) => {
        $(#[test]
        fn $name() {
            if let Some(failure) = failure($share) {
                panic!("{failure}");
            }
        })*
    };
}

shares! {
    seeds_0 0
    seeds_1000 1
    seeds_2000 2
    seeds_3000 3
    seeds_4000 4
    seeds_5000 5
    seeds_6000 6
    seeds_7000 7
    seeds_8000 8
    seeds_9000 9
}

#[test]
fn a_script_decides_everything() {
    for seed in [3, 77, 4711] {
        let script = Script::of(seed);
        let once = kprov_sim::run_traced(&script, |_| {});
        let again = kprov_sim::run_traced(&script, |_| {});
        assert!(once.trace.len() > 20, "seed {seed}: {} lines", once.trace.len());
        assert_eq!(once.trace, again.trace, "seed {seed}");
        let read: Script = serde_json::from_str(&serde_json::to_string(&script).unwrap()).unwrap();
        assert_eq!(read, script);
    }
}
