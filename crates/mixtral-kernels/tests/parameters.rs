//! A launch passes as many arguments as its kernel has parameters, and of the same sizes. The compiler tells the
//! parameters' sizes.

use std::collections::BTreeMap;

use mixtral_engine::{KvScale, Program};
use mixtral_kernels::{
    Arch, Cache, Code, Compiler, Family, Kernel, Launch, Nvrtc, Schedule, Search, Sources, Target, Work, compile_all,
};
use mixtral_model::DType;
use mixtral_testkit::decoder::{self, Geometry};

/// Bytes of each parameter of the only entry of a PTX text.
fn parameters(ptx: &str) -> Vec<usize> {
    let entry = ptx.split_once(".entry").expect("an entry").1;
    let list = entry.split_once('(').expect("parameters").1.split_once(')').expect("an end").0;
    let one = |text: &str| match text.split_once(".b8 ") {
        // `.param .align 64 .b8 name[128]`
        Some((_, array)) => array.split_once('[').and_then(|(_, n)| n.trim_end_matches(']').parse().ok()),
        None => [("64", 8), ("32", 4)].iter().find_map(|(bits, bytes)| {
            ["u", "s", "b", "f"].iter().any(|kind| text.contains(&format!(".{kind}{bits}"))).then_some(*bytes)
        }),
    };
    let texts = list.split(',').map(str::trim).filter(|text| !text.is_empty());
    texts.map(|text| one(text).unwrap_or_else(|| panic!("`{text}`"))).collect()
}

fn programs() -> Vec<Program> {
    let programs = [Geometry::small(DType::F32), Geometry::small(DType::F16), Geometry::round(DType::Bf16)]
        .map(|geometry| [true, false].map(|fused| decoder::program(&geometry, fused)));
    let quantized = ["int4:g64:f16:zeros", "int8:row:f32"].map(|word| {
        let mut program = decoder::program(&Geometry::round(DType::Bf16), true);
        decoder::quantize(&mut program, word.parse().expect("a format"));
        program
    });
    let mut cached =
        [Geometry::small(DType::F16), Geometry::round(DType::Bf16)].map(|geometry| decoder::program(&geometry, true));
    cached.iter_mut().for_each(|program| decoder::cache_in_fp8(program, KvScale { key: 0.02, value: 0.01 }));
    let mut in_fp8 = cached.clone();
    in_fp8.iter_mut().for_each(Program::attend_in_fp8);
    programs.into_iter().flatten().chain(quantized).chain(cached).chain(in_fp8).collect()
}

#[test]
fn launches_have_their_kernels_parameters() {
    let compiler = match Nvrtc::load(&Search::from_environment()) {
        Ok(nvrtc) => Compiler::new(nvrtc, Sources::embedded()),
        Err(error) => {
            println!("skipped: {error}");
            return;
        }
    };
    let cache = Cache::folder_from_environment().map(Cache::new);
    for (family, code) in [(Family::Portable, Code::Ptx(Arch::BASE)), (Family::Hopper, Code::Ptx(Arch::SM_90A))] {
        let mut launches: BTreeMap<Kernel, Launch> = BTreeMap::new();
        for program in programs() {
            let schedule = Schedule::new(&program, Target { family }).unwrap_or_else(|e| panic!("{e}"));
            let launch = |work| if let Work::Launch(launch) = work { Some(launch) } else { None };
            let all = schedule.regimes.into_iter().flat_map(|(_, work)| work).filter_map(launch);
            let fills = schedule.fills.into_iter().map(|(_, fill)| fill);
            let packs = schedule.packs.into_iter().map(|pack| pack.launch);
            let all = all.chain(fills).chain(packs).chain([schedule.probe]);
            launches.extend(all.map(|launch| (launch.kernel.clone(), launch)));
        }
        let work: Vec<_> = launches.keys().map(|kernel| (kernel.clone(), code)).collect();
        let batch = compile_all(&compiler, &work, 2, cache.as_ref(), &|_| ()).unwrap_or_else(|e| panic!("{e}"));
        assert!(batch.kernels.len() > 40, "{} kernels", batch.kernels.len());
        for (kernel, _, compiled) in batch.kernels {
            let wanted = parameters(std::str::from_utf8(&compiled.image).expect("PTX is text"));
            let given: Vec<usize> = launches[&kernel].args.iter().map(|named| named.arg.size()).collect();
            assert_eq!(given, wanted, "{} for {code}", kernel.symbol);
        }
    }
}
