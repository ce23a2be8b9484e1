use tsquant::jit::*;
fn main() {
    let path = std::env::args().nth(1).unwrap();
    let m = Module::load(std::path::Path::new(&path)).map_err(|e| e.to_string()).unwrap();
    println!("{:?} {:?}", m.signature(), m.notes());
    let rest: Vec<String> = std::env::args().skip(2).collect();
    let args: Vec<_> = rest.iter().map(|s| {
        let (k, dims) = s.split_once(':').unwrap();
        let dims: Vec<i64> = dims.split('x').map(|d| d.parse().unwrap()).collect();
        let t = if k == "i" { tch::Tensor::ones(&dims, (tch::Kind::Int64, tch::Device::Cpu)) } else { tch::Tensor::rand(&dims, (tch::Kind::Float, tch::Device::Cpu)) };
        (None, Argument::Tensor(t))
    }).collect();
    let a = if args.is_empty() { None } else { Some(m.bind(args).map_err(|e| e.to_string()).unwrap()) };
    let t = std::time::Instant::now();
    let c = m.clean(a.as_ref()).map_err(|e| e.to_string()).unwrap();
    println!("{:?} {:?}", t.elapsed(), c.notes());
    for n in &c.listing().nodes {
        let ins: Vec<String> = n.inputs.iter().map(|i| { let v=&c.listing().values[*i]; match &v.constant { Some(k) if k.is_tensor() => format!("<{:?} {:?}>", k.shape, k.parameter), Some(k) => k.text.clone(), None => format!("%{}", v.name)} }).collect();
        println!("{} b{} path={:?} param={:?} ({}) -> {:?}", n.op, n.block, n.path, n.parameter, ins.join(", "), n.outputs.iter().map(|i| (&c.listing().values[*i].name, c.listing().values[*i].has_writers, &c.listing().values[*i].seen)).collect::<Vec<_>>());
    }
}
